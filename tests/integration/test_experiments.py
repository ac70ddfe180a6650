"""The paper's studies: tasks run once, results become tables and pictures, claims have rules."""
import contextlib
import copy
import fcntl
import importlib
import itertools
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
from common.errors import ArgumentError, Stopped, UserError
from common.files import sha256_file
from diffusion import create_diffusion
from evaluation.records import read_record, write_record
from experiments import block_types, ema_decay, guidance, jobs, scaling, score_worker
from experiments.cli import build_parser, run_study
from experiments.jobs import Task, run_tasks
from experiments.presets import PRESETS
from experiments.report import STUDIES, fill_page
from experiments.score_worker import fix_variance, generate_samples
from experiments.statistics import (
    argmin_mean,
    correlation_interval,
    cross_validated_best,
    verdict_lower,
    verdict_of_share,
)
from experiments.study import StudyTasks, find_checkpoint, network_cost
from helpers import ROOT, wait_for
from models import DiT, DiT_models
from networks import build_dit

TOY = PRESETS["digits", "toy"]
# The paper's table 4: 10^9 multiply-adds, and FID-50K; patches of 8, 4, 2 of each size.
TABLE_4 = {"S": ((0.36, 153.60), (1.41, 100.41), (6.06, 68.40)), "B": ((1.42, 122.74), (5.56, 68.38), (23.01, 43.47)),
           "L": ((5.01, 118.87), (19.70, 45.64), (80.71, 23.33)),
           "XL": ((7.39, 106.41), (29.05, 43.01), (118.64, 19.47))}


class InThisProcess:
    """Runs the commands of tasks in this process, one after the other, and lists what was started."""

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

    wait = poll


@pytest.fixture
def in_this_process(monkeypatch):
    launcher = InThisProcess()
    monkeypatch.setattr(jobs, "start_process", launcher)
    return launcher


def run(name, folder, *flags):
    """Run a study at toy size and return its results."""
    study = importlib.import_module(f"experiments.{name}").STUDY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", "--scale", "toy", "--work", f"{folder}/work", "--output",
                                    f"{folder}/results", "--workers", "1", *flags])
        run_study(study)
    return read_record(f"{folder}/results/{name}-digits-toy.json")


def test_studies_share_trainings_and_fill_the_page(in_this_process, tmp_path):
    """From the commands to the page; a second start repeats nothing, or only what is missing."""
    page = tmp_path / "results.md"
    page.write_text("# Studies\n<!-- begin summary -->\n<!-- end -->\n" + "".join(
        f"## {name}\n<!-- begin {name}-digits-toy -->\nold\n<!-- end -->\nby hand\n" for name in STUDIES))
    for name in STUDIES:
        results = run(name, tmp_path)
        assert results["study"] == name and results["made"]["versions"]["torch"] and results["seeds"]
        with Image.open(tmp_path / "results" / f"{name}-digits-toy.png") as picture:
            assert picture.width > 600 and len(picture.convert("L").getcolors()) > 10
    started = in_this_process.started
    block_types, grid, averages = 5 * len(TOY.seeds), 1, len(TOY.seeds)  # the grid's other network is of block_types
    assert started.count("train.py") == block_types + grid + averages and started.count("evaluate.py") == 1
    text = page.read_text()
    assert "old" not in text and text.count("by hand") == len(STUDIES)
    assert text == fill_page(text, tmp_path / "results")
    assert not list(tmp_path.glob("work/**/best.pt"))
    assert "**not clear** |" in text and "(results/guidance-digits-toy.png)" in text

    started.clear()
    again = run("scaling", tmp_path)
    assert started == []
    (score,) = (tmp_path / "work" / "digits-toy" / "scores" / "2x16-4-adaln-zero-seed-0").glob("samples-12-*.json")
    another = score.read_text().replace('"samples": 12', '"samples": 13')
    for change in (score.unlink, lambda: score.write_text(another)):  # missing, and of another request
        change()
        started.clear()
        assert run("scaling", tmp_path)["rows"] == again["rows"] and started == ["experiments.score_worker"]


def train(study, training):
    for task in (study.reference, training):
        run_tasks([task], 1, log=lambda line: None)


def test_a_longer_training_continues_a_shorter_one(in_this_process, tmp_path):
    """With another learning rate it is another training, and refuses the checkpoint."""
    for steps in (2, 4):
        study = StudyTasks(block_types.STUDY, replace(TOY, steps=steps), tmp_path)
        training = study.training(0)
        train(study, training)
    assert list(training.record()["curve"]) == ["2", "4"] and os.path.exists(find_checkpoint(training.path, 4))
    assert "at step 2" in Path(training.path + ".log").read_text()
    other = StudyTasks(block_types.STUDY, replace(TOY, lr=1.0), tmp_path).training(0)
    assert not other.is_done()
    with pytest.raises(UserError, match="lr"):
        run_tasks([other], 1, log=lambda line: None)


def test_averages_of_one_training_are_those_of_several(in_this_process, tmp_path):
    """One run with several decays has, bit for bit, the EMA of a run with each; 0 is the weights themselves."""
    weights = {}
    for decays in ((), (0.0, 0.9)):
        study = StudyTasks(block_types.STUDY, replace(TOY, ema_decay=0.5 if decays else 0.9), tmp_path / str(decays))
        training = study.training(3, decays=decays)
        train(study, training)
        checkpoint = find_checkpoint(training.path, 4)
        stored = load_checkpoint(checkpoint)
        weights |= {"model": stored["model"], "0.9": stored["ema"]} if not decays else {"several": stored["extra_emas"]}
    assert sorted(os.listdir(os.path.dirname(checkpoint))) == ["0000001.pt", "0000004.pt"]
    for name, key in (("model", "0"), ("0.9", "0.9")):
        assert all(torch.equal(weights["several"][key][weight], value) for weight, value in weights[name].items())


WORKER = """
import os, signal, sys, time
name, folder = sys.argv[1:]
open(f"{folder}/{name}.starts", "a").write("x")
signal.signal(signal.SIGTERM, lambda *_: (open(f"{folder}/{name}.stopped", "w").close(), os._exit(75)))
while name == "long" and not os.path.exists(f"{folder}/go"):
    time.sleep(0.01)
open(f"{folder}/{name}.out", "w").close()
"""
DRIVER = """
import sys
from experiments.jobs import Task, run_tasks
from common.errors import run_command
folder, *deadline = sys.argv[1:]
source = open(folder + "/worker.py").read()
tasks = [Task(folder=folder, name=name, request={}, argv=("-c", source, name, folder), output=f"{folder}/{name}.out",
              cost=cost) for name, cost in (("short", 1), ("long", 2))]
run_command(lambda: run_tasks(tasks, 2, deadline=float(deadline[0]) if deadline else None))
"""


def test_a_killed_or_stopped_study_continues(tmp_path):
    """After SIGKILL, SIGTERM and a deadline finished tasks stay finished, and running ones are asked to save."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]

    def start(*deadline):
        return subprocess.Popen([*command, *deadline], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    killed = start()
    wait_for(lambda: (tmp_path / "short.json").exists() and (tmp_path / "long.starts").exists())
    killed.kill()
    killed.wait()
    if sys.platform == "linux":
        wait_for(lambda: (tmp_path / "long.stopped").exists())
    stopped = start()
    wait_for(lambda: (tmp_path / "long.starts").read_text() == "xx")
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 75
    assert start(str(time.monotonic() - 1)).wait(60) == 75  # the time is up already
    (tmp_path / "go").touch()
    last = start()
    out, _ = last.communicate(timeout=60)
    assert last.returncode == 0 and "[1/1] long" in out and "short" not in out
    assert (tmp_path / "short.starts").read_text() == "x" and (tmp_path / "long.starts").read_text() == "xxx"


def test_a_study_waits_for_another_until_its_deadline(tmp_path):
    with open(tmp_path / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = []
        with pytest.raises(Stopped):
            run_tasks([Task(folder=str(tmp_path), name="x", request={})], 1, None, time.monotonic(), lines.append)
    assert len(lines) == 1 and not (tmp_path / "x.log").exists()


def test_a_failed_task_is_reported_with_its_last_lines(tmp_path, monkeypatch):
    def fail(command, log, threads, lock):
        Path(log).write_text("the reason\n")
        return SimpleNamespace(poll=lambda: 2, wait=lambda: 2)

    monkeypatch.setattr(jobs, "start_process", fail)
    with pytest.raises(UserError, match=r"(?s)^x failed .*the reason.*x\.log"):
        run_tasks([Task(folder=str(tmp_path), name="x", request={})], 1)


def small_network(std=1.0):
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=std)
    return model


def test_fixed_variances_are_those_of_the_process():
    """A network with a learned variance that is replaced is sampled as the process with that fixed variance is."""
    model = small_network()
    noise, y = torch.randn(3, 1, 8, 8), dict(y=torch.arange(3))

    def sample(network, **process):
        torch.manual_seed(1)
        return create_diffusion("5", **process).p_sample_loop(network, noise.shape, noise, clip_denoised=False,
                                                              model_kwargs=y)

    learned = sample(model)
    for name, small in (("fixed_small", True), ("fixed_large", False)):
        plain = sample(lambda x, t, y: model(x, t, y)[:, :1], learn_sigma=False, sigma_small=small)
        changed = copy.deepcopy(model)
        fix_variance(changed, name)
        fixed = sample(changed)
        assert torch.allclose(fixed, plain, atol=1e-5) and not torch.allclose(fixed, learned, atol=1e-3)
    fix_variance(model, "learned")
    assert torch.equal(sample(model), learned)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_variance_is_fixed_in_every_precision(tmp_path, monkeypatch, precision):
    """In bf16 a copy of the network is sampled."""
    monkeypatch.setattr(score_worker, "fastest_config", lambda device: ComputeConfig(precision))
    sets, signals = [], SimpleNamespace(received=None)
    for variance in ("learned", "fixed_small", "fixed_large"):
        loaded = SimpleNamespace(model=small_network(std=0.3), autoencoder=IdentityAutoencoder(1), num_classes=10)
        score = dict(path=str(tmp_path / variance), asked=dict(samples=4, steps=4, seed=1, variance=variance))
        sets.append(generate_samples(loaded, score, dict(batch=4, fast=True), signals).images)
    assert all((one != other).any() for one, other in itertools.combinations(sets, 2))


def test_a_stopped_set_of_samples_continues(tmp_path):
    """After a signal in the second batch the next start makes the rest, and the set is the same."""
    loaded = SimpleNamespace(model=small_network(std=0.1), autoencoder=IdentityAutoencoder(1), num_classes=10)
    asked = dict(samples=7, steps=4, seed=1, cfg_scale=2.0, variance="fixed_small")

    class SignalAtCall8:
        calls = 0

        @property
        def received(self):
            self.calls += 1
            return "SIGTERM" if self.calls == 8 else None

    sets, silent = [], SimpleNamespace(received=None)
    for folder, starts in (("stopped", (SignalAtCall8(), silent)), ("complete", (silent,))):
        for signals in starts:
            score = dict(path=str(tmp_path / folder), asked=asked)
            with contextlib.suppress(Stopped):
                sets.append(generate_samples(loaded, score, dict(batch=3, fast=False), signals))
        assert not list((tmp_path / folder / "set" / "parts").glob("*.npz"))
    stopped, complete = sets  # the first start returned none
    assert (stopped.images == complete.images).all() and len(complete) == 7


def test_correlation_is_the_papers():
    """-0.93, from the numbers of table 4."""
    pairs = [pair for pairs in TABLE_4.values() for pair in pairs]
    correlation = scaling.correlate([dict(multiply_adds=gflops, distance=[fid]) for gflops, fid in pairs])
    low, high = correlation_interval(correlation, len(pairs))
    assert round(correlation, 2) == -0.93 and low < correlation < high < -0.7


def test_a_difference_is_seen_if_the_seeds_agree():
    """By Student's t over the differences: two seeds must agree closely, one shows nothing."""
    assert verdict_lower([1.0, 2.0, 3.0], [2.0, 3.1, 4.0]) == "yes"  # each seed by about 1, however they differ
    assert verdict_lower([2.0, 3.1, 4.0], [1.0, 2.0, 3.0]) == "no"
    assert verdict_lower([1.0, 2.0, 3.0], [2.0, 1.9, 4.0]) == "not clear"
    assert verdict_lower([1.0, 1.0], [2.0, 1.5]) == "not clear" and verdict_lower([1.0], [9.0]) == "not clear"
    assert [verdict_of_share([True] * wins + [False] * (4 - wins)) for wins in (4, 3, 2)] == ["yes", "not clear", "no"]
    before = [0.5, 0.9]
    assert [ema_decay.verdict_longer(before[:len(after)], after) for after in (
        [0.9, 0.99], [0.1, 0.5], [0.9, 0.9], [0.9, 0.5], [0.9])] == ["yes", "no", *["not clear"] * 3]


def test_settings_are_chosen_by_the_other_seeds():
    """The best of several that differ by chance alone is no finding; a single seed shows nothing."""
    settings = {"a": [1.0, 3.0, 3.0], "b": [3.0, 1.0, 3.0], "c": [3.0, 3.0, 1.0]}
    assert argmin_mean(settings) == "a" and min(cross_validated_best(settings)) == 3.0
    assert cross_validated_best({"a": [1.0, 1.1], "b": [2.0, 2.1]}) == [1.0, 1.1]
    assert cross_validated_best({"a": [1.0], "b": [2.0]}) == [1.0]


@pytest.mark.parametrize("distances, here, verdict", [((5, 4, 3), "no rise seen up to 2", "not clear"),
                                                     ((5, 3, 4), "4.10 ± 0.10 at 2", "yes")])
def test_guidance_may_show_no_rise(distances, here, verdict):
    rows = [dict(guided="all timesteps", scale=scale, agreement=[0.5] * 3, distance=[
        distance + 0.1 * seed for seed in range(3)]) for scale, distance in zip((1, 1.5, 2), distances)]
    claim = next(row for row in guidance.claims(dict(rows=rows)) if row[0].startswith("too much"))
    assert claim[2:] == (here, verdict)


def test_nothing_is_compared_across_two_classifiers(tmp_path):
    """The folder may be moved; with another classifier what was measured is not done, in all presets."""
    preset = PRESETS["fractals", "miniature"]
    studies = [StudyTasks(scaling.STUDY, replace(preset, name=name), tmp_path / "a") for name in ("one", "two")]
    assert studies[0].classifier == studies[1].classifier and studies[0].reference == studies[1].reference

    def requests_with(classifier, folder):
        study = StudyTasks(scaling.STUDY, preset, tmp_path / folder)
        for task, content in ((study.classifier, classifier), (study.reference, "numbers")):
            os.makedirs(os.path.dirname(task.path), exist_ok=True)
            Path(task.output).write_text(content)
            write_record(task.path + ".json", dict(asked=task.full_request(), sha256=sha256_file(task.output)))
        return [task.full_request() for task in (study.reference, *study.trainings, *study.scores)]

    first = requests_with("a classifier", "a")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = StudyTasks(scaling.STUDY, preset, tmp_path / "b")
    assert moved.classifier.is_done() and moved.reference.is_done() and requests_with("a classifier", "b") == first
    assert all(old != new for old, new in zip(first, requests_with("another", "b")))


def test_networks_are_the_papers():
    network = StudyTasks(scaling.STUDY, PRESETS["fractals", "paper"], "x").network("S", 2)
    network |= dict(in_channels=4, num_classes=1000)
    assert network_cost(**network)["multiply_adds"] / 1e9 == pytest.approx(6.06, abs=0.005)
    with torch.device("meta"):
        ours, published = ({key: value.shape for key, value in model.state_dict().items()}
                           for model in (build_dit(**network), DiT_models["DiT-S/2"]()))
    assert ours == published


@pytest.mark.parametrize("name, flags", [("scale", ["--scale", "paper"]), ("steps", ["--steps", "400"]),
                                         ("sizes", ["--sizes", "9x9"])])
def test_mistakes_are_reported_before_any_work(monkeypatch, name, flags):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
    with pytest.raises(ArgumentError) as error:
        run_study(scaling.STUDY)
    assert list(error.value.arguments) == [name]
    assert [action.dest for action in build_parser("x")._actions if not action.help] == []


def test_the_page_shows_the_stored_results():
    """The tables of docs/experiments.md are those of the JSON, and its pictures exist."""
    folder = ROOT / "docs" / "experiments"
    text = (ROOT / "docs" / "experiments.md").read_text()
    assert fill_page(text, folder) == text, "run: python -m experiments.report"
    for picture in re.findall(r"\]\((experiments/\S+\.png)\)", text):
        assert os.path.exists(ROOT / "docs" / picture)
