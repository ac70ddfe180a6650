"""train.py --eval-every: scores while a run trains, which do not change the run; and tools.plot_run."""
import csv
import json
import logging
import os
import re
import signal
import time
from functools import partial

import numpy as np
import pytest

from common.checkpoint_io import load_checkpoint
from common.errors import EXIT_RESTARTABLE, UserError
from helpers import DIGITS, AtCall, call, send_signal
from run_files import differences, folder_of, pixels, scalars, steps_of, stored
from training.logger import MetricLogger

RUN = [*DIGITS, "--lr", 0.01, "--ema-decay", 0.5, "--max-steps", 9, "--log-every", 3]
BATCH = "evaluation.image_sources.GeneratedImages.batch"  # makes a batch of samples
EVAL = ["--eval-features", "pixels", "--eval-samples", 12, "--eval-sampling-steps", "ddim3"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "held-out.npz"
    call("evaluate", "reference", "digits-held-out", "--features", "pixels", "--output", path)
    return path


def rows_of(results):
    with open(folder_of(results) / "evaluations.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_does_not_change_the_run(children, reference, tmp_path, processes):
    children.run("train", *RUN, "--results-dir", tmp_path / "quiet", processes=processes)
    out = children.run("train", *RUN, *EVAL, "--eval-every", 2, "--eval-reference", reference, "--ckpt-every", 4,
                       "--results-dir", tmp_path / "watched", processes=processes)
    assert differences(stored(tmp_path / "quiet", 9), stored(tmp_path / "watched", 9)) == []
    rows = rows_of(tmp_path / "watched")
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"] and {row["images"] for row in rows} == {"12"}
    distances = {int(row["step"]): float(row["frechet_distance"]) for row in rows}
    assert scalars(tmp_path / "watched", "eval/frechet_distance") == pytest.approx(distances)
    assert all(f"(step={step:07d}) frechet_distance: {distance:.4f}" in out for step, distance in distances.items())
    assert "Evaluation: Frechet distance (pixels, 12 images) of EMA samples (ddim, 3 steps, guidance 1)" in out
    assert "36 forward passes of one image each time" in out and "WARNING: 12 samples in 192 dimensions" in out
    record = json.loads((folder_of(tmp_path / "watched") / "evaluations.json").read_text())
    assert record["samples"]["made"].items() >= dict(weights="ema", ema_decay=0.5, sampler="ddim", seed=0).items()
    assert record["reference"]["source"]["path"] == "digits-held-out"
    best = load_checkpoint(str(folder_of(tmp_path / "watched") / "checkpoints" / "best.pt"))
    assert best["step"] == min(distances, key=distances.get)
    if best["step"] % 4 == 0:
        assert differences(best, stored(tmp_path / "watched", best["step"])) == []


def test_scores_are_those_of_evaluate_py(run_ok, reference, tmp_path):
    run_ok("train", *RUN, *EVAL, "--eval-every", 9, "--eval-reference", reference, "--results-dir", tmp_path)
    best = folder_of(tmp_path) / "checkpoints" / "best.pt"
    assert best.samefile(best.with_name("0000009.pt"))
    run_ok("evaluate", "score", best, "--reference", reference, "--features", "pixels", "--cfg-scale", 1,
           "--num-fid-samples", 12, "--num-sampling-steps", "ddim3", "--per-proc-batch-size", 8,
           "--output", tmp_path / "record.json")
    found = json.loads((tmp_path / "record.json").read_text())["scores"]
    (row,) = rows_of(tmp_path)
    assert found == pytest.approx({name: float(row[name]) for name in found}, rel=1e-7)


def test_a_resumed_run_replaces_the_rows_of_repeated_steps(run_ok, reference, tmp_path):
    flags = [*RUN, *EVAL, "--eval-every", 2, "--eval-reference", reference, "--results-dir", tmp_path]
    run_ok("train", *flags, "--ckpt-every", 5)
    first = rows_of(tmp_path)
    os.truncate(folder_of(tmp_path) / "checkpoints" / "0000009.pt", 100)
    os.truncate(folder_of(tmp_path) / "evaluations.csv", (folder_of(tmp_path) / "evaluations.csv").stat().st_size - 9)
    assert "at step 5" in run_ok("train", *flags, "--ckpt-every", 5, "--resume", "auto")
    again = rows_of(tmp_path)
    assert [row["step"] for row in again] == ["2", "4", "6", "8"]
    assert [row["frechet_distance"] for row in again] == [row["frechet_distance"] for row in first]


@pytest.mark.parametrize("every", [2, 3])
def test_a_run_killed_while_the_best_is_kept_ends_as_one_that_was_not(children, reference, tmp_path, every):
    flags = [*RUN, *EVAL, "--eval-every", every, "--eval-reference", reference, "--ckpt-every", 3]
    children.run("train", *flags, "--results-dir", tmp_path / "alone")
    children.run("train", *flags, "--results-dir", tmp_path / "killed", status=-signal.SIGKILL,
                 prepare=AtCall("training.checkpoint_manager.CheckpointManager.save_best", 2, send_signal))
    children.run("train", *flags, "--results-dir", tmp_path / "killed", "--resume", "auto")
    scores = [[(row["step"], row["frechet_distance"]) for row in rows_of(tmp_path / name)]
              for name in ("alone", "killed")]
    assert scores[0] == scores[1] and len(scores[0]) == 9 // every
    best = [load_checkpoint(str(folder_of(tmp_path / name) / "checkpoints" / "best.pt"))
            for name in ("alone", "killed")]
    assert best[0]["step"] == best[1]["step"] and differences(*best) == []


def test_other_settings_begin_new_tables(run_ok, reference, tmp_path):
    flags = [*RUN, *EVAL, "--eval-every", 4, "--results-dir", tmp_path]
    run_ok("train", *flags, "--max-steps", 5, "--eval-reference", reference)
    out = run_ok("train", *flags, "--eval-reference", "digits", "--resume", "auto")
    assert "WARNING: the settings of the evaluation have changed" in out
    assert out.count("the best so far") == 1
    assert [row["step"] for row in rows_of(tmp_path)] == ["8"]
    assert (folder_of(tmp_path) / "evaluations-before.csv").read_text().splitlines()[1].startswith("4,")
    out = run_ok("train", *flags, "--max-steps", 12, "--eval-reference", "digits", "--resume", "auto")
    assert "settings of the evaluation" not in out and len(rows_of(tmp_path)) == 2


def raise_error(kind):
    raise kind("no memory for this")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("error", [MemoryError, UserError])
def test_a_failed_evaluation_does_not_change_the_run(children, reference, tmp_path, processes, error):
    flags = [*EVAL, "--eval-samples", 64, "--eval-every", 4, "--eval-reference", reference]
    children.run("train", *RUN, "--results-dir", tmp_path / "quiet", processes=processes)
    out = children.run("train", *RUN, *flags, "--results-dir", tmp_path / "watched", processes=processes,
                       prepare=AtCall(BATCH, 2, partial(raise_error, error), rank=processes - 1))
    assert (out.count("the evaluation failed") == 1 and "no memory for this" in out) or processes == 2
    assert [row["step"] for row in rows_of(tmp_path / "watched")] == ["8"]
    assert differences(stored(tmp_path / "quiet", 9), stored(tmp_path / "watched", 9)) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_stops_an_evaluation_within_two_batches(children, reference, tmp_path, processes):
    out = children.run("train", *RUN, *EVAL, "--eval-samples", 8 * 5000, "--eval-every", 4, "--eval-reference",
                       reference, "--results-dir", tmp_path, processes=processes, status=EXIT_RESTARTABLE,
                       prepare=AtCall(BATCH, 1, partial(send_signal, signal.SIGTERM), rank=processes - 1))
    assert "frechet_distance:" not in out and not (folder_of(tmp_path) / "evaluations.csv").exists()
    assert steps_of(tmp_path) in ([5], [6])  # the ranks agree on the signal one step after it came


def test_training_continues_if_a_table_cannot_be_written(run_ok, reference, tmp_path):
    flags = [*RUN, *EVAL, "--eval-every", 4, "--eval-reference", reference, "--results-dir", tmp_path]
    run_ok("train", *RUN, "--max-steps", 1, "--results-dir", tmp_path)
    (folder_of(tmp_path) / "evaluations.csv").mkdir()
    out = run_ok("train", *flags, "--resume", "auto")
    assert re.search(r"WARNING: cannot write \S+evaluations.csv", out)
    assert out.count("frechet_distance:") == 2


SOUND = ["--eval-every", 5, "--eval-reference", "digits", "--eval-features", "pixels"]


@pytest.mark.parametrize("flags, problem", [
    (["--eval-every", 5], "--eval-reference"),
    (["--eval-reference", "digits"], "--eval-every"),
    ([*SOUND, "--eval-reference", "nothing"], "nothing"),
    ([*SOUND, "--eval-features", "nothing"], "--eval-features nothing: "),
    ([*SOUND, "--eval-sampling-steps", 5000], "--eval-sampling-steps 5000"),
    ([*SOUND, "--eval-samples", 3], "--eval-samples 3"),
])
def test_mistakes_are_reported_before_the_first_step(command, tmp_path, flags, problem):
    status, out, err = command("train", *RUN, *flags, "--results-dir", tmp_path)
    assert status == 2 and problem in err and "Traceback" not in err and "step=" not in out
    assert not list(tmp_path.glob("000-*"))  # no empty folder is left behind


def test_a_reference_of_another_size_is_reported_before_the_first_step(command, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((9, 16, 16, 3), dtype=np.uint8))
    status, out, err = command("train", *RUN, *EVAL, "--eval-every", 2, "--eval-reference", tmp_path / "large.npz",
                               "--results-dir", tmp_path)
    assert status == 2 and "768 numbers" in err and "step=" not in out


def test_the_time_of_an_evaluation_does_not_count_as_training(tmp_path):
    monitor = MetricLogger(logging.getLogger("dit"), str(tmp_path), 0, 9, 8)
    with monitor:
        start, before = monitor.start, time.perf_counter()
        with monitor.paused():
            time.sleep(0.05)
        assert 0.05 <= monitor.start - start <= time.perf_counter() - before


def test_runs_are_plotted(run_ok, run_error, reference, tmp_path):
    run_ok("train", *RUN, *EVAL, "--eval-every", 4, "--eval-reference", reference, "--results-dir", tmp_path)
    run_ok("train", *RUN, "--results-dir", tmp_path)
    one, two = folder_of(tmp_path), folder_of(tmp_path, 1)
    sizes = []
    for flags, path in (([one], one / "training.png"), ([two], two / "training.png"),
                        ([one, two, "--output", tmp_path / "both.png"], tmp_path / "both.png")):
        run_ok("tools.plot_run", *flags)
        sizes.append(pixels(path).shape[:2])
    assert sizes[0] == sizes[2] and sizes[0][1] == 2 * sizes[1][1]
    (tmp_path / "folder.png").mkdir()
    run_ok("train", *RUN, *EVAL, "--eval-every", 4, "--eval-samples", 20, "--eval-reference", reference,
           "--results-dir", tmp_path)
    run_ok("tools.plot_run", one, folder_of(tmp_path, 2), "--output", tmp_path / "three.png")
    assert pixels(tmp_path / "three.png").shape[1] > 2.5 * sizes[1][1]
    for flags, problem in (([one, two], "--output: several runs"), ([tmp_path], "is not a run of train.py"),
                            ([one, "--output", tmp_path / "x.what"], ".what"),
                            ([one, "--output", tmp_path / "folder.png"], "cannot write"),
                            ([one, "--output", tmp_path / "no" / "x.png"], "there is no folder")):
        assert problem in run_error("tools.plot_run", *flags)
