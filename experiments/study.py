"""A study: the trainings and scores it needs, and the results that it stores."""
import functools
import glob
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.flops import count_multiply_adds, count_parameters
from common.provenance import collect_environment
from evaluation.periodic import read_score_table
from evaluation.records import try_read, write_record
from experiments.jobs import Task
from experiments.report import summarize_environment
from models import DiT_models
from networks import build_dit


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study of the paper, declared by a module of this package. `results` is what `StudyTasks.results` returns."""

    name: str  # of its module
    title: str  # of its picture
    rows: Callable  # (preset) -> [(fields of a row of the results, arguments of `training`, arguments of `score`)]
    columns: dict | Callable  # {heading: (row) -> text}, or (results) -> (rows, such a dictionary)
    panels: Callable  # (results) -> [arguments of `report.draw_panel`]
    claims: Callable  # (results) -> [(claim, the paper, here, verdict)]
    # If a row's distance is a function of x, the heading of x in the table. The third element of `rows` is then
    # {x: arguments of `score`}, and the distance in the results is a list of pairs (x, values of the seeds).
    x_heading: Callable = None
    metrics: tuple = ("distance",)  # otherwise, what the results have of a row; "curve" is the distance over training
    sampled: str = "Samples without guidance, by {}"  # {} is the preset's sampler
    seeds: str = "seeds"  # field of the preset


class StudyTasks:
    """The tasks of a study. Studies of a preset share trainings and scores; all presets share what measures them.

    Attributes:
        rows (list): (fields of the results, {x: scores of the seeds}) of each row; without an x there is one, None.
    """

    def __init__(self, study, preset, work_dir):
        self.study, self.preset, self.seeds = study, preset, getattr(preset, study.seeds)
        self.shared_dir = os.path.join(os.path.abspath(work_dir), preset.data)
        self.folder = f"{self.shared_dir}-{preset.name}"
        self.data_flags = ("--data-path", preset.data, "--image-size", preset.image_size,
                           "--num-classes", preset.num_classes)
        self.classifier = None
        if preset.features == "classifier":
            self.classifier = self._file_task("classifier", "classifier.pt", "-m", "tools.train_classifier",
                                              *self.data_flags)
        self.features = self.classifier.output if self.classifier else preset.features
        self.reference = self._file_task("reference", "held-out.npz", "evaluate.py", "--make-reference",
                                         f"{preset.data}-held-out", "--features", self.features)
        self.rows = [self._build_row(*row) for row in study.rows(preset)]
        groups = itertools.chain.from_iterable(settings.values() for _, settings in self.rows)
        # At guidance scale 1 two settings may be the same.
        scores = {score.name: score for score in itertools.chain.from_iterable(groups)}.values()
        (self.samples,) = {score.request["samples"] for score in scores}
        self.baseline = self._task(f"scores/real-images-{self.samples}", dict(real_images=self.samples))
        self.scores = sorted((*scores, self.baseline), key=lambda score: -score.cost)
        self.trainings = list({score.needs.name: score.needs for score in scores}.values())

    def _task(self, name, request, **fields):
        return Task(folder=self.folder, name=name, request=request, classifier=self.classifier, **fields)

    def _file_task(self, name, file_name, *argv):
        argv = (*argv, "--output", os.path.join(self.shared_dir, file_name))
        # The request has paths by their last names: the folder may be moved.
        words = [os.path.basename(word) if os.path.isabs(word) else word for word in map(str, argv)]
        return Task(folder=self.shared_dir, name=name, request=dict(arguments=words), argv=argv, output=argv[-1],
                    classifier=self.classifier)

    def _build_row(self, fields, training, sampling):
        trainings = {seed: self.training(seed, **training) for seed in self.seeds}
        settings = sampling if self.study.x_heading else {None: sampling}
        scores = {x: [self.score(task, seed=seed, **options) for seed, task in trainings.items()]
                  for x, options in settings.items()}
        return fields | network_cost(**self.network(**training)), scores

    def network(self, size=None, patch=None, conditioning="adaln-zero", decays=()):
        """Return the arguments of `build_dit` for those of `training`."""
        depth, hidden_size, num_heads = self.preset.sizes[size or self.preset.network[0]]
        return dict(input_size=self.preset.image_size, patch_size=patch or self.preset.network[1],
                    in_channels=self.preset.channels, hidden_size=hidden_size, depth=depth, num_heads=num_heads,
                    num_classes=self.preset.num_classes, conditioning=conditioning)

    def training(self, seed, size=None, patch=None, conditioning="adaln-zero", decays=()):
        """Return the training of a network. Default: the preset's network, which several studies share.

        With further `decays` of the EMA the snapshots are kept, and no curve is measured.
        """
        preset, size, patch = self.preset, size or self.preset.network[0], patch or self.preset.network[1]
        network, model = self.network(size, patch, conditioning), f"DiT-{size}/{patch}"
        flags = [*self.data_flags, "--vae", "none", "--num-workers", preset.num_workers, "--model",
                 model if model in DiT_models else "DiT-S/2", "--depth", network["depth"],
                 "--hidden-size", network["hidden_size"], "--num-heads", network["num_heads"], "--patch-size", patch,
                 *(["--conditioning", conditioning] if conditioning != "adaln-zero" else []),
                 "--global-batch-size", preset.batch_size, "--lr", preset.lr, "--ema-decay", preset.ema_decay, *decays,
                 "--global-seed", seed]
        if decays:
            name, options = f"ema_decay/{size}-{patch}-seed-{seed}", ["--ckpt-every", preset.snapshot_steps[0]]
        else:
            name = f"trainings/{size}-{patch}-{conditioning}-seed-{seed}"
            options = ["--ckpt-every", preset.curve_every, "--keep-checkpoints", 1, "--eval-every", preset.curve_every,
                       "--eval-samples", preset.curve_samples, "--eval-sampling-steps", preset.curve_sampling,
                       "--eval-features", self.features, "--eval-reference", self.reference.output]
        options += ["--log-every", preset.curve_every, *(["--fast"] if preset.fast else [])]
        path, kept_steps = os.path.join(self.folder, name), preset.snapshot_steps if decays else [preset.steps]
        cost = network_cost(**network)
        # float32: weights, EMAs and Adam's two moments
        disk_bytes = len(kept_steps) * 4 * (4 + len(decays)) * cost["parameters"]
        return self._task(name, dict(train=[str(flag) for flag in flags], steps=preset.steps),
                          argv=("train.py", *flags, *options, "--max-steps", preset.steps, "--resume", "auto",
                                "--results-dir", path), cost=cost["multiply_adds"] * preset.steps,
                          collect=functools.partial(collect_curve, path, kept_steps, not decays), disk_bytes=disk_bytes)

    def score(self, training, **sampling):
        """Return the score of a trained network.

        `sampling`: seed; samples and steps (as --num-sampling-steps) unless they are the preset's; optionally
        timestep_spacing, cfg_scale, cfg_channels, cfg_interval, variance ("fixed_small", "fixed_large"), after
        (training steps), decay.
        """
        sampling = dict(samples=self.preset.samples, steps=self.preset.sampling) | sampling
        passes = int(re.sub(r"\D", "", str(sampling["steps"]))) * (2 if sampling.get("cfg_scale", 1) > 1 else 1)
        words = "-".join(f"{key}-{_format_word(value)}" for key, value in sampling.items())
        return self._task(f"scores/{os.path.basename(training.name)}/{words}",
                          dict(training=training.request) | sampling, needs=training,
                          cost=training.cost * passes * sampling["samples"])

    def stages(self, workers):
        """Yield lists of tasks, each of which needs those before it; `workers` processes share the scores."""
        if self.classifier:
            yield [self.classifier]
        yield [self.reference]
        yield self.trainings
        missing = [score for score in self.scores if not score.is_done()]
        yield [self._score_batch(i, missing[i::workers]) for i in range(min(workers, len(missing)))]

    def _score_batch(self, number, scores):
        """Write down what to score and return the task that does it."""
        name = f"scores/{self.study.name}-{number}"
        path = os.path.join(self.folder, name + ".request.json")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        requests = [dict(path=score.path, asked=score.full_request(), checkpoint=score.needs and find_checkpoint(
            score.needs.path, score.request.get("after", self.preset.steps))) for score in scores]
        write_record(path, dict(
            images=self.preset.data, features=self.features, reference=self.reference.output,
            batch=self.preset.sample_batch, fast=self.preset.fast, scores=requests))
        return self._task(name, {}, argv=("-m", "experiments.score_worker", path), parts=scores)

    def results(self):
        """Return the results as plain values, once all tasks are done."""
        preset, real = self.preset, self.baseline.record()
        tasks = [self.reference, *self.trainings, *self.scores, *([self.classifier] if self.classifier else [])]
        records = [task.record() for task in tasks]
        return dict(
            study=self.study.name, data=preset.data, scale=preset.name, steps=preset.steps,
            work_minutes=round(sum(record["seconds"] for record in records) / 60, 1),
            made=collect_environment(device_type()), seeds=self.seeds, network="{}/{}".format(*preset.network),
            rows=[fields | self._measured(settings) for fields, settings in self.rows], features=preset.features,
            samples=self.samples, sampling=preset.sampling,
            training={name: getattr(preset, name) for name in ("steps", "batch_size", "lr", "ema_decay")},
            curve_samples=preset.curve_samples, curve_sampling=preset.curve_sampling, held_out=real["held_out"],
            real=dict(images=real["images"], distance=real["scores"]["frechet_distance"]),
            made_by=sorted({summarize_environment(record["made"]) for record in records if record.get("made")}))

    def _measured(self, settings):
        if self.study.x_heading:
            return dict(distance=[[x, read_metric("distance", scores)] for x, scores in settings.items()])
        return {name: read_metric(name, settings[None]) for name in self.study.metrics}


def find_checkpoint(path, step):
    """Return the path of a training's checkpoint after some steps; starts before the first one leave empty runs."""
    return glob.glob(f"{glob.escape(path)}/*/checkpoints/{step:07d}.pt")[0]


def collect_curve(path, kept_steps, has_curve):
    """Return the distances over the steps of a training, None while the last is missing; remove other checkpoints."""
    folder = os.path.dirname(find_checkpoint(path, kept_steps[-1]))
    run_dir, kept = os.path.dirname(folder), {f"{step:07d}.pt" for step in kept_steps}
    curve = {row["step"]: row["frechet_distance"] for row in read_score_table(f"{run_dir}/evaluations.csv")}
    if has_curve and kept_steps[-1] not in curve:
        return None
    for name in os.listdir(folder):
        if name.endswith(".pt") and name not in kept:
            os.remove(os.path.join(folder, name))
    return dict(curve=curve, made=try_read(f"{run_dir}/evaluations.json").get("samples", {}).get("made", {}))


def read_metric(name, scores):
    """Return a metric of finished scores; "curve": [[step, distances of the seeds]] at the steps that all have."""
    if name != "curve":
        return [score.record()["scores"]["frechet_distance" if name == "distance" else name] for score in scores]
    curves = [score.needs.record()["curve"] for score in scores]
    steps = sorted(int(step) for step in set.intersection(*map(set, curves)))
    return [[step, [curve[str(step)] for curve in curves]] for step in steps]


def _format_word(value):
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@functools.cache
def network_cost(**network):
    """Return dict(parameters, multiply_adds) of a network of `build_dit`, the latter of a forward pass of one image."""
    with torch.device("meta"):
        model = build_dit(**network)
    return dict(parameters=count_parameters(model), multiply_adds=int(count_multiply_adds(model)))


def device_type():
    """Return the type of the device that the tasks will use, such as "cuda"."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
