"""Trainings and scores as pieces of work, and how much a network computes."""
import functools
import os
from dataclasses import dataclass

import torch

import models
from evaluation.during_training import read_rows
from evaluation.records import try_read, write_record
from runtime import checkpoint, costs
from runtime.experiment import experiment_folders

from .pieces import Command, Piece, plain
from .scales import Images, Scale


@dataclass(frozen=True)
class Training(Piece):
    """A run of train.py, measured while it trains.

    flags    of train.py that say what is trained, as a tuple of names and values
    more     those that change nothing of it
    steps    optimiser steps
    """
    folder: str
    name: str
    flags: tuple
    more: tuple
    steps: int
    cost: float

    @property
    def asked(self):
        return dict(train=[str(flag) for flag in self.flags], steps=self.steps)

    def command(self):
        return [str(flag) for flag in ("train.py", *self.flags, *self.more, "--max-steps", self.steps, "--results-dir",
                                       self.path, "--resume", "auto")]

    def finish(self, seconds):
        """Keep the distances over the steps, and where the checkpoint of the last step is."""
        (run,) = [folder for folder in experiment_folders(self.path) if checkpoint.newest(folder)]
        curve = {row["step"]: row["frechet_distance"] for row in read_rows(os.path.join(run, "evaluations.csv"))}
        made = try_read(os.path.join(run, "evaluations.json")).get("samples", {}).get("made", {})
        path = checkpoint.steps_in(run)[self.steps]
        if self.steps in curve:  # else the measurement was given up: the next start does it
            write_record(self.path + ".json", dict(asked=self.asked, seconds=seconds, curve=curve, made=made,
                                                   checkpoint=os.path.relpath(path, self.folder)))

    def checkpoint(self, **asked):
        return os.path.abspath(os.path.join(self.folder, self.record()["checkpoint"]))


@dataclass(frozen=True)
class Score(Piece):
    """Samples of a trained network and how good they are; made by `Scores`, several by one process.

    asked     the training, and how its network is sampled: a dictionary
    training  what has a checkpoint(**asked), the path of the weights, once it is done
    """
    folder: str
    name: str
    asked: dict
    training: object
    cost: float

    def checkpoint(self):
        return self.training.checkpoint(**self.asked)

    def found(self, name="frechet_distance"):
        """A number of a score that is there."""
        return self.record()["scores"][name]


@dataclass(frozen=True)
class Scores(Piece):
    """What one process measures: see `experiments.scoring`.

    scores    of any networks
    settings  what all of them share: images, features, reference, batch, fast
    """
    folder: str
    name: str
    scores: list
    settings: dict
    cost: float

    def command(self):
        missing = [score for score in self.scores if not score.is_done()]
        write_record(self.path + ".request.json", self.settings | dict(
            scores=[dict(path=score.path, asked=score.asked, checkpoint=score.checkpoint()) for score in missing]))
        return ["-m", "experiments.scoring", self.path + ".request.json"]

    def is_done(self):
        return all(score.is_done() for score in self.scores)

    def seconds(self):
        return sum(score.record().get("seconds", 0) for score in self.scores)

    def finish(self, seconds):
        """Nothing: each score has left its own record."""


class Setup:
    """A data set and a scale, and the folder where the work on them is kept: makes the pieces of all studies."""

    def __init__(self, images: Images, scale: Scale, folder, workers=1):
        self.images, self.scale, self.workers = images, scale, workers
        self.folder = os.path.join(folder, f"{images.name}-{scale.name}")

    @property
    def features(self):
        """As --features takes them."""
        return self._absolute("classifier.pt") if self.images.features == "classifier" else self.images.features

    def _absolute(self, name):
        return os.path.abspath(os.path.join(self.folder, name))

    def _classifier(self):
        return [Command(self.folder, "classifier", ("train_classifier.py", *self.images.flags[:6], "--output",
                                                    self.features), self.features)]

    def _reference(self):
        """The piece that measures the held-out images; all that trains or scores comes after it."""
        output = self._settings()["reference"]
        return Command(self.folder, "reference", (
            "evaluate.py", "--make-reference", self.images.held_out, "--features", self.features, "--output", output),
            output)

    def _settings(self):
        """What the processes that score need to know."""
        return dict(images=self.images.name, features=self.features, reference=self._absolute("held-out.npz"),
                    batch=self.scale.sample_batch, fast=self.scale.fast)

    def network(self, size, patch):
        """The arguments of `models.DiT` of a size of this scale."""
        depth, hidden_size, num_heads = self.scale.sizes[size]
        return dict(input_size=self.images.image_size, patch_size=patch, in_channels=self.images.channels,
                    hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_classes=self.images.num_classes)

    def training(self, size, patch, seed, conditioning="adaln-zero"):
        """A run of train.py; the default is the same training in every study."""
        scale, name, (depth, width, heads) = self.scale, f"DiT-{size}/{patch}", self.scale.sizes[size]
        flags = [*self.images.flags, "--model", name if name in models.DiT_models else "DiT-S/2", "--depth", depth,
                 "--hidden-size", width, "--num-heads", heads, "--patch-size", patch]
        flags += ["--conditioning", conditioning] if conditioning != "adaln-zero" else []
        flags += ["--global-batch-size", scale.batch_size, "--lr", scale.lr, "--ema-decay", scale.ema_decay,
                  "--global-seed", seed]
        watching = ["--ckpt-every", scale.curve_every, "--keep-checkpoints", 1, "--log-every", scale.curve_every,
                    "--eval-every", scale.curve_every, "--eval-samples", scale.curve_samples, "--eval-sampling-steps",
                    scale.curve_sampling, "--eval-features", self.features, "--eval-reference",
                    self._settings()["reference"]]
        return Training(self.folder, f"trainings/{size}-{patch}-{conditioning}-seed-{seed}", tuple(flags),
                        (*watching, *(["--fast"] if scale.fast else [])), scale.steps,
                        multiply_adds(self.network(size, patch)) * scale.steps)

    def score(self, training, **sampling):
        """A way to sample a training's network; all that is not given is the scale's.

        sampling  samples, steps (as --num-sampling-steps), seed, and perhaps cfg_scale, cfg_channels, cfg_interval,
                  variance ("fixed_small", "fixed_large"): see `experiments.scoring`; of more, `weights` is a name
        """
        sampling = dict(samples=self.scale.samples, steps=self.scale.sampling) | sampling
        name = "-".join(f"{key}-{_word(value)}" for key, value in sampling.items())
        return Score(self.folder, f"scores/{os.path.basename(training.name)}/{name}",
                     plain(dict(training=training.asked) | sampling), training,
                     training.cost * _calls(sampling) * sampling["samples"])

    def stages(self, name, scores):
        """The pieces of a study with these scores, in lists: the pieces of each need those of the lists before."""
        trainings = {score.training.name: score.training for score in scores}
        counts = sorted({score.asked["samples"] for score in scores})
        judge = [self._classifier()] if self.images.features == "classifier" else []
        return [*judge, [self._reference()], list(trainings.values()),
                [*self._shared(name, scores), *(self.yardsticks(count) for count in counts)]]

    def _shared(self, name, scores):
        """These scores in one piece for each worker, with about as much work."""
        scores = {score.name: score for score in scores}.values()  # at guidance scale 1 two ways may be the same
        shares = [[] for _ in range(min(self.workers, len(scores)))]
        for score in sorted(scores, key=lambda score: -score.cost):
            min(shares, key=_cost).append(score)
        return [Scores(self.folder, f"scores/{name}-{number}", share, self._settings(), _cost(share))
                for number, share in enumerate(shares)]

    def judged(self, scores):
        """How samples were judged, for the results of a study: what its scores have in common."""
        scale, (count,) = self.scale, {score.asked["samples"] for score in scores.values()}
        real = self.yardsticks(count).record()
        training = {name: getattr(scale, name) for name in ("steps", "batch_size", "lr", "ema_decay")}
        return dict(features=self.images.features, samples=count, sampling=scale.sampling, training=training,
                    curve_samples=scale.curve_samples, curve_sampling=scale.curve_sampling, real=real["real"],
                    held_out=real["held_out"])

    def yardsticks(self, count):
        """The piece that measures real images as if they were samples."""
        return Yardsticks(self.folder, f"yardsticks-{count}", count, self._settings())


@dataclass(frozen=True)
class Yardsticks(Piece):
    """The distance of real images: `count` of those that are trained on, or all, to the held-out ones."""
    folder: str
    name: str
    count: int
    settings: dict
    cost: float = 0

    @property
    def asked(self):
        return dict(count=self.count)

    def command(self):
        write_record(self.path + ".request.json", self.settings | dict(path=self.path, asked=self.asked))
        return ["-m", "experiments.scoring", self.path + ".request.json"]

    def finish(self, seconds):
        """Nothing: the process has left the record."""


def curve_of(scores):
    """[[step, distances of the trainings]] of the trainings of some scores, at the steps at which all were measured."""
    curves = [score.training.record()["curve"] for score in scores]
    steps = sorted(int(step) for step in set.intersection(*map(set, curves)))
    return [[step, [curve[str(step)] for curve in curves]] for step in steps]


def _cost(scores):
    return sum(score.cost for score in scores)


def _word(value):
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value:g}" if isinstance(
        value, float) else str(value)


def _calls(sampling):
    """How often the network is asked for an image."""
    return int(str(sampling["steps"]).removeprefix("ddim")) * (2 if sampling.get("cfg_scale", 1) > 1 else 1)


def multiply_adds(network):
    """Of one forward pass for one image: what the paper calls flops. network: arguments of `models.DiT`."""
    return _multiply_adds(tuple(network.items()))


@functools.cache
def _multiply_adds(network):
    with torch.device("meta"):
        return int(costs.multiply_adds(models.DiT(**dict(network))))
