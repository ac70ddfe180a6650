"""The paper's studies: pieces that are done once, tables and pictures of what was found, what is called a finding."""
import contextlib
import fcntl
import importlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from autoencoder.vae import IdentityAutoencoder
from common.checkpoint_io import load_checkpoint
from common.compute import ComputeConfig
from common.errors import Stopped, UserError
from diffusion import create_diffusion
from evaluation.records import read_record
from experiments import jobs, score_worker
from experiments.guidance import claims
from experiments.job_types import StudyContext, multiply_adds
from experiments.jobs import CommandTask, run_tasks
from experiments.many_averages import snapshot
from experiments.presets import DIGITS, PRESETS, STUDY_DATA
from experiments.report import STUDIES, written
from experiments.runner import build_parser, run_study
from experiments.score_worker import make_samples, with_variance
from experiments.statistics import (
    argmin_mean,
    correlation,
    correlation_interval,
    cross_validated_best,
    verdict_lower,
    verdict_of_all,
    verdict_of_share,
    verdict_same_sign,
)
from helpers import ROOT, wait_for
from models import DiT, DiT_models
from networks import build_dit

TOY = PRESETS["digits", "toy"]
# The paper's table 4: 10^9 multiply-adds, and FID-50K; patches of 8, 4, 2 of each size.
TABLE_4 = {"S": ((0.36, 153.60), (1.41, 100.41), (6.06, 68.40)), "B": ((1.42, 122.74), (5.56, 68.38), (23.01, 43.47)),
           "L": ((5.01, 118.87), (19.70, 45.64), (80.71, 23.33)),
           "XL": ((7.39, 106.41), (29.05, 43.01), (118.64, 19.47))}


class InThisProcess:
    """Runs the commands of pieces here, one after the other, where all is imported already; keeps what was started."""

    def __init__(self):
        self.started = []

    def __call__(self, command, log, threads, lock):
        module, *flags = [part for part in command[1:] if part != "-m"]
        self.started.append(module)
        with pytest.MonkeyPatch.context() as patch, open(log, "a") as output, contextlib.redirect_stdout(output):
            patch.setattr(sys, "argv", [module, *flags])
            patch.chdir(ROOT)
            importlib.import_module(module.removesuffix(".py")).main()
        return self

    def poll(self):
        return 0


@pytest.fixture
def in_this_process(monkeypatch):
    launcher = InThisProcess()
    monkeypatch.setattr(jobs, "start_process", launcher)
    return launcher


def run(name, folder, *flags):
    """Run a study at toy size; returns what it found."""
    module = importlib.import_module(f"experiments.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", "--scale", "toy", "--work", f"{folder}/work", "--output",
                                    f"{folder}/found", "--workers", "1", *flags])
        run_study(module)
    return read_record(f"{folder}/found/{name}-digits-toy.json")


def test_every_study_from_its_command_to_the_page(in_this_process, tmp_path, capsys):
    """Trainings are shared, pictures drawn, tables written; a second start does nothing, or what is missing alone."""
    page = tmp_path / "found.md"
    page.write_text("# Studies\n<!-- begin summary -->\n<!-- end -->\n" + "".join(
        f"## {name}\n<!-- begin {name}-digits-toy -->\nold\n<!-- end -->\nby hand\n" for name in STUDIES))
    for name in STUDIES:
        found = run(name, tmp_path)
        assert found["study"] == name and found["made"]["versions"]["torch"] and found["seeds"]
        with Image.open(tmp_path / "found" / f"{name}-digits-toy.png") as picture:
            assert picture.width > 600 and len(picture.convert("L").getcolors()) > 10
    started = in_this_process.started
    types = 5 * len(TOY.seeds)
    assert started.count("train.py") == types + 1  # of the grid of two sizes, one network is that of the other studies
    assert started.count("evaluate.py") == 1 and started.count("experiments.many_averages") == len(TOY.seeds)
    text = page.read_text()
    assert "old" not in text and text.count("by hand") == len(STUDIES)
    assert text == written(text, tmp_path / "found")
    assert not list(tmp_path.glob("work/**/best.pt")) + list(tmp_path.glob("work/**/state.pt"))
    assert "by DDIM in 2 steps; while it trains, 8 by DDIM in 2 steps" in text
    assert "| adaln-single |" in text and "**not clear** |" in text and "(found/guidance-digits-toy.png)" in text

    started.clear()
    again = run("scaling", tmp_path)
    assert started == [] and again["rows"] == found_by("scaling", tmp_path)["rows"]
    (score,) = (tmp_path / "work" / "digits-toy" / "scores" / "2x16-4-adaln-zero-seed-0").glob("samples-12-*.json")
    score.unlink()
    assert run("scaling", tmp_path)["rows"] == again["rows"] and started == ["experiments.scoring"]
    score.write_text(score.read_text().replace('"samples": 12', '"samples": 13'))  # of something else: not taken
    started.clear()
    assert run("scaling", tmp_path)["rows"] == again["rows"] and started == ["experiments.scoring"]


def found_by(name, folder):
    return read_record(f"{folder}/found/{name}-digits-toy.json")


def test_a_training_goes_on_from_its_checkpoint(in_this_process, tmp_path):
    """Twice as many steps are the old ones and as many more; another learning rate is another training, and told."""
    longer, shorter = (StudyContext(DIGITS, replace(TOY, steps=steps), tmp_path) for steps in (4, 2))
    for setup in (shorter, longer):
        score = setup.score(setup.training("1x16", 4, 0), seed=0)
        for stage in setup.stages("x", [score])[:2]:
            run_tasks(stage, 1, say=lambda line: None)
    record = score.training.metadata()
    assert list(record["curve"]) == ["2", "4"] and record["checkpoint"].endswith("0000004.pt")
    with open(score.training.path + ".log") as log:
        assert "at step 2" in log.read()
    other = StudyContext(DIGITS, replace(TOY, lr=1.0), tmp_path).training("1x16", 4, 0)
    assert not other.is_done()
    with pytest.raises(UserError, match=r"--lr is 1\.0, it was 0\.02"):
        run_tasks([other], 1, say=lambda line: None)


def test_averages_are_those_of_train(in_this_process, tmp_path):
    """Several averages in one run: each the EMA of train.py with that decay, to the last bit, also after a break."""
    setup = StudyContext(DIGITS, replace(TOY, ema_decay=0.5), tmp_path)
    training = setup.training("1x16", 4, 3)
    for stage in setup.stages("x", [setup.score(training, seed=0)])[:2]:
        run_tasks(stage, 1, say=lambda line: None)
    request = dict(folder=str(tmp_path / "averages"), network=setup.network("1x16", 4), data_path="digits",
                   num_workers=0, seed=3, batch_size=8, lr=TOY.lr, decays=[0, 0.5], fast=False, save_every=2)

    def start(**changes):
        path = tmp_path / "request.json"
        path.write_text(json.dumps(request | changes))
        in_this_process([None, "-m", "experiments.many_averages", str(path)], tmp_path / "log", 1, None)

    start(snapshots=[3])
    for name, changed in (("lr", 1.0), ("decays", [0, 0.9]), ("snapshots", [2, 4])):
        with pytest.raises(UserError, match=f"state.pt is of a training with other {name}: remove it"):
            start(**dict(snapshots=[3, 4]) | {name: changed})
    start(snapshots=[3, 4], save_every=1)  # goes on
    stored = load_checkpoint(training.checkpoint())
    for decay, name in ((0.5, "ema"), (0, "model")):
        mine = load_checkpoint(snapshot(request["folder"], 4, decay))
        assert all(torch.equal(mine["ema"][key], value) for key, value in stored[name].items())
    assert not torch.equal(stored["ema"]["x_embedder.proj.weight"], stored["model"]["x_embedder.proj.weight"])


WORKER = """
import os, signal, sys, time
name, folder = sys.argv[1:]
open(f"{folder}/{name}.starts", "a").write("x")
signal.signal(signal.SIGTERM, lambda *_: (open(f"{folder}/{name}.told", "w").close(), os._exit(75)))
while name == "long" and not os.path.exists(f"{folder}/go"):
    time.sleep(0.01)
open(f"{folder}/{name}.out", "w").close()
"""
DRIVER = """
import sys
from experiments.pieces import Command, run_pieces
from common.errors import run_command
folder, *more = sys.argv[1:]
pieces = [Command(folder, name, ("-c", open(folder + "/worker.py").read(), name, folder), f"{folder}/{name}.out", cost)
          for name, cost in (("short", 1), ("long", 2))]
run_command(lambda: run_pieces(pieces, 2, deadline=float(more[0]) if more else None))
"""


def test_killed_and_started_again(tmp_path):
    """SIGKILL, SIGTERM and a deadline: what was done stays done, what was begun is told to save, and goes on."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]

    def start(*more):
        return subprocess.Popen([*command, *more], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    killed = start()
    wait_for(lambda: (tmp_path / "short.json").exists() and (tmp_path / "long.starts").exists())
    killed.kill()
    killed.wait()
    if sys.platform == "linux":
        wait_for(lambda: (tmp_path / "long.told").exists())
    told = start()
    wait_for(lambda: (tmp_path / "long.starts").read_text() == "xx")
    told.send_signal(signal.SIGTERM)
    assert told.wait(60) == 75
    assert start(str(time.monotonic() - 1)).wait(60) == 75  # the time is up already
    (tmp_path / "go").touch()
    last = start()
    out, _ = last.communicate(timeout=60)
    assert last.returncode == 0 and "[1/1] long" in out and "short" not in out
    assert (tmp_path / "short.starts").read_text() == "x" and (tmp_path / "long.starts").read_text() == "xxx"


def test_waiting_for_another_study_ends_at_the_deadline(tmp_path):
    with open(tmp_path / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = []
        with pytest.raises(Stopped):
            run_tasks([CommandTask(str(tmp_path), "x", ("a",), "b")], 1, deadline=time.monotonic(), say=said.append)
    assert "another study is at work" in said[0] and not (tmp_path / "x.log").exists()


def test_a_piece_that_fails_is_told(tmp_path):
    """Its name, its last words, and where the rest is."""
    def fail(command, log, threads, lock):
        with open(log, "w") as file:
            file.write("the reason\n")
        return type("Failed", (), dict(poll=lambda self: 2))()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "start_process", fail)
        with pytest.raises(UserError, match=r"x failed with exit status 2: [^\n]+\nthe reason\n\(all of it: .*x.log\)"):
            run_tasks([CommandTask(str(tmp_path), "x", ("a",), "b")], 1)


def small_network(std=1.0):
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=std)
    return model


def test_fixed_variances_are_those_of_the_process():
    """A network with a learned variance, told to use a fixed one, is sampled as the process with that one is."""
    model = small_network()
    noise, y = torch.randn(3, 1, 8, 8), dict(y=torch.arange(3))

    def sampled(network, **process):
        torch.manual_seed(1)
        return create_diffusion("5", **process).p_sample_loop(network, noise.shape, noise, clip_denoised=False,
                                                              model_kwargs=y)

    learned = sampled(model)
    for name, small in (("fixed_small", True), ("fixed_large", False)):
        plain = sampled(lambda x, t, y: model(x, t, y)[:, :1], learn_sigma=False, sigma_small=small)
        with with_variance(model, name):
            fixed = sampled(model)
        assert torch.allclose(fixed, plain, atol=1e-5) and not torch.allclose(fixed, learned, atol=1e-3)
    assert torch.equal(sampled(model), learned)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_variance_is_fixed_however_it_is_computed(tmp_path, monkeypatch, precision):
    """In bf16 it is a copy of the network that is sampled."""
    monkeypatch.setattr(score_worker, "fastest", lambda device: ComputeConfig(precision))
    trained = SimpleNamespace(model=small_network(std=0.3), autoencoder=IdentityAutoencoder(1), num_classes=10)
    sets, signals = [], SimpleNamespace(received=None)
    for variance in ("learned", "fixed_small", "fixed_large"):
        score = dict(path=str(tmp_path / variance), asked=dict(samples=4, steps=4, seed=1, variance=variance))
        sets.append(make_samples(trained, score, dict(batch=4, fast=True), signals).images)
    assert all((one != other).any() for one, other in itertools.combinations(sets, 2))


def test_a_set_of_samples_goes_on(tmp_path):
    """Told to stop at some step of the second batch, the next start makes what is missing, and the set is the same."""
    trained = SimpleNamespace(model=small_network(std=0.1), autoencoder=IdentityAutoencoder(1), num_classes=10)
    asked = dict(samples=7, steps=4, seed=1, cfg_scale=2.0, variance="fixed_small")

    class Told:
        calls = 0

        @property
        def received(self):
            self.calls += 1
            return "SIGTERM" if self.calls == 8 else None

    sets = []
    for folder, starts in (("broken", (Told(), SimpleNamespace(received=None))), ("whole", (
            SimpleNamespace(received=None),))):
        for signals in starts:
            score = dict(path=str(tmp_path / folder), asked=asked)
            with contextlib.suppress(Stopped):
                sets.append(make_samples(trained, score, dict(batch=3, fast=False), signals))
        assert not list((tmp_path / folder / "set" / "parts").glob("*.npz"))
    broken, whole = sets  # the first start gave none
    assert (broken.images == whole.images).all() and len(whole) == 7


def test_correlation_of_the_paper():
    """-0.93, of the numbers of table 4."""
    x, y = zip(*(pair for pairs in TABLE_4.values() for pair in pairs))
    r = correlation([math.log10(value) for value in x], y)
    assert round(r, 2) == -0.93
    low, high = correlation_interval(r, len(x))
    assert low < r < high < -0.7
    with pytest.raises(ValueError, match="does not vary"):
        correlation([1, 2], [3, 3])


def test_what_is_called_seen():
    """By Student's t over the seeds' differences: two seeds must agree closely, one says nothing."""
    assert verdict_lower([1.0, 2.0, 3.0], [2.0, 3.1, 4.0]) == "yes"  # each seed by about 1, however they differ
    assert verdict_lower([2.0, 3.1, 4.0], [1.0, 2.0, 3.0]) == "no"
    assert verdict_lower([1.0, 2.0, 3.0], [2.0, 1.9, 4.0]) == "not clear"
    assert verdict_lower([1.0, 1.0], [2.0, 1.5]) == "not clear" and verdict_lower([1.0], [9.0]) == "not clear"
    assert [verdict_of_share([True] * wins + [False] * (4 - wins)) for wins in (4, 3, 2)] == ["yes", "not clear", "no"]
    assert verdict_of_all(["yes", "yes"]) == "yes" and verdict_of_all(["yes", "no"]) == "not clear"


def test_settings_are_chosen_by_other_seeds():
    """So that the best of several that differ by chance alone is no finding; a single seed says nothing."""
    settings = {"a": [1.0, 3.0, 3.0], "b": [3.0, 1.0, 3.0], "c": [3.0, 3.0, 1.0]}
    assert argmin_mean(settings) == "a" and min(cross_validated_best(settings)) == 3.0
    assert cross_validated_best({"a": [1.0, 1.1], "b": [2.0, 2.1]}) == [1.0, 1.1]
    assert cross_validated_best({"a": [1.0], "b": [2.0]}) == [1.0]
    assert [verdict_same_sign(own) for own in ([1, 2], [-1, -2], [1, 0], [1, -1], [1])] == [
        "yes", "no", "not clear", "not clear", "not clear"]


@pytest.mark.parametrize("distances, here, verdict", [((5, 4, 3), "no rise seen up to 2", "not clear"),
                                                     ((5, 3, 4), "4.10 ± 0.10 at 2", "yes")])
def test_what_too_much_guidance_does(distances, here, verdict):
    rows = [dict(guided="all timesteps", scale=scale, agreement=[0.5] * 3, distance=[
        distance + 0.1 * seed for seed in range(3)]) for scale, distance in zip((1, 1.5, 2), distances)]
    claim = next(row for row in claims(dict(rows=rows)) if row[0].startswith("too much"))
    assert claim[2:] == (here, verdict)


def test_nothing_is_compared_across_two_classifiers(tmp_path):
    """The folder may be moved; another classifier makes what was measured with the old one undone, at all scales."""
    setups = [StudyContext(STUDY_DATA["fractals"], replace(PRESETS["fractals", "miniature"], name=name), tmp_path / "a")
              for name in ("one", "two")]
    assert setups[0].judge == setups[1].judge and setups[0].reference == setups[1].reference

    def finished(classifier, folder):
        setup = StudyContext(STUDY_DATA["fractals"], PRESETS["fractals", "miniature"], tmp_path / folder)
        for piece, content in ((setup.judge, classifier), (setup.reference, "numbers")):
            os.makedirs(os.path.dirname(piece.path), exist_ok=True)
            Path(piece.output).write_text(content)
            piece.finish(1.0)
        score = setup.score(setup.training("2x32", 8, 0), seed=0)
        return [piece.asked for piece in (setup.reference, score.training, score, setup.yardsticks(9))]

    first = finished("a classifier", "a")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = StudyContext(STUDY_DATA["fractals"], PRESETS["fractals", "miniature"], tmp_path / "b")
    assert moved.judge.is_done() and moved.reference.is_done() and finished("a classifier", "b") == first
    assert all(old != new for old, new in zip(first, finished("another", "b")))


def test_multiply_adds_are_the_papers():
    paper = STUDY_DATA["fractals"], PRESETS["fractals", "paper"]
    network = StudyContext(*paper, "x").network("S", 2) | dict(in_channels=4, num_classes=1000)
    assert multiply_adds(network) / 1e9 == pytest.approx(6.06, abs=0.005)
    with torch.device("meta"):
        ours, published = ({key: value.shape for key, value in model.state_dict().items()}
                           for model in (build_dit(**network), DiT_models["DiT-S/2"]()))
    assert ours == published


def test_mistakes():
    """In sentences, before any work."""
    for flags, sentence in ((["--scale", "paper"], r"--scale paper: for --data digits there are miniature, toy"),
                            (["--steps", "400"], r"--steps 400: --scale miniature measures every 300 steps; "),
                            (["--sizes", "9x9"], r"--sizes 9x9: --scale miniature has 2x32, ")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=sentence):
            patch.setattr(sys, "argv", ["scaling.py", *flags])
            run_study(importlib.import_module("experiments.scaling"))
    assert [action.dest for action in build_parser("x")._actions if not action.help] == []


def test_the_page_shows_the_results_that_are_kept():
    """docs/experiments.md: its tables are those of the JSON beside it, and its pictures are there."""
    folder = ROOT / "docs" / "experiments"
    text = (ROOT / "docs" / "experiments.md").read_text()
    assert written(text, folder) == text, "run: python -m experiments.report"
    for picture in re.findall(r"\]\((experiments/\S+\.png)\)", text):
        assert os.path.exists(ROOT / "docs" / picture)
