"""Trainings and scores as pieces of work, and how much a network computes."""

import contextlib
import functools
import os
from dataclasses import dataclass

import torch

import models
from common.checkpoint_io import latest_checkpoint, list_checkpoints
from common.flops import count_multiply_adds, count_parameters
from evaluation.periodic import read_score_table
from evaluation.records import try_read, write_record
from experiments.jobs import CommandTask, Task, judged_by, to_json_types
from experiments.presets import StudyData, StudyPreset
from networks import build_dit
from training.run_dir import list_run_dirs

TRAINED_BYTES = 16  # of a parameter in a checkpoint: weights, average and Adam's two moments


@dataclass(frozen=True)
class TrainingTask(Task):
    """A run of train.py, measured while it trains.

    flags    of train.py that say what is trained, as a tuple of names and values
    more     those that change nothing of it
    steps    optimiser steps
    disk     bytes that it keeps
    judge    the classifier in whose features the curve is measured, if it is one
    """
    folder: str
    name: str
    flags: tuple
    more: tuple
    steps: int
    cost: float
    disk: int = 0
    judge: CommandTask = None

    @property
    def asked(self):
        return dict(train=[str(flag) for flag in self.flags], steps=self.steps) | judged_by(self.judge)

    def command(self):
        return [str(flag) for flag in ("train.py", *self.flags, *self.more, "--max-steps", self.steps, "--results-dir",
                                       self.path, "--resume", "auto")]

    def finish(self, seconds):
        """Keep the distances over the steps, and where the checkpoint of the last step is; not that of the best."""
        (run,) = [folder for folder in list_run_dirs(self.path) if latest_checkpoint(folder)]
        curve = {row["step"]: row["frechet_distance"] for row in read_score_table(os.path.join(run, "evaluations.csv"))}
        made = try_read(os.path.join(run, "evaluations.json")).get("samples", {}).get("made", {})
        path = list_checkpoints(run)[self.steps]
        if self.steps in curve:  # else the measurement was given up: the next start does it
            write_record(self.path + ".json", dict(asked=self.asked, seconds=seconds, curve=curve, made=made,
                                                   checkpoint=os.path.relpath(path, self.folder)))
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(run, "checkpoints", "best.pt"))

    def checkpoint(self, **asked):
        return os.path.abspath(os.path.join(self.folder, self.metadata()["checkpoint"]))


@dataclass(frozen=True)
class ScoreTask(Task):
    """Samples of a trained network and how good they are; made by `ScoreBatchTask`, several by one process.

    sampling  how the network is sampled: a dictionary
    training  what has a checkpoint(**sampling), the path of the weights, once it is done
    judge     the classifier in whose features it is measured, if it is one
    """
    folder: str
    name: str
    sampling: dict
    training: Task
    cost: float
    judge: CommandTask = None

    @property
    def asked(self):
        return to_json_types(dict(training=self.training.asked) | self.sampling | judged_by(self.judge))

    def checkpoint(self):
        return self.training.checkpoint(**self.sampling)

    def found(self, name="frechet_distance"):
        """A number of a score that is there."""
        return self.metadata()["scores"][name]


@dataclass(frozen=True)
class ScoreBatchTask(Task):
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
        return sum(score.metadata().get("seconds", 0) for score in self.scores)

    def finish(self, seconds):
        """Nothing: each score has left its own record."""


class StudyContext:
    """A data set and a scale, and the folder where the work on them is kept: makes the pieces of all studies.

    The classifier and the reference are the data set's: all its scales are judged alike.
    """

    def __init__(self, images: StudyData, scale: StudyPreset, folder, workers=1):
        self.images, self.scale, self.workers = images, scale, workers
        self.folder = os.path.join(folder, f"{images.name}-{scale.name}")
        shared, classifier, self.judge = os.path.join(folder, images.name), images.features == "classifier", None
        self.features = os.path.abspath(os.path.join(shared, "classifier.pt")) if classifier else images.features
        if classifier:
            self.judge = CommandTask(shared, "classifier", ("train_classifier.py", *images.data_flags, "--output",
                                                        self.features), self.features)
        output = os.path.abspath(os.path.join(shared, "held-out.npz"))
        self.reference = CommandTask(shared, "reference", (
            "evaluate.py", "--make-reference", images.held_out, "--features", self.features, "--output", output),
            output, judge=self.judge)

    def _settings(self):
        """What the processes that score need to know."""
        return dict(images=self.images.name, features=self.features, reference=self.reference.output,
                    batch=self.scale.sample_batch, fast=self.scale.fast)

    def network(self, size, patch):
        """The arguments of `build_dit` of a size of this scale."""
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
                    self.reference.output]
        network = self.network(size, patch) | dict(conditioning=conditioning)
        return TrainingTask(self.folder, f"trainings/{size}-{patch}-{conditioning}-seed-{seed}", tuple(flags),
                        (*watching, *(["--fast"] if scale.fast else [])), scale.steps,
                        multiply_adds(network) * scale.steps, TRAINED_BYTES * parameters(network), self.judge)

    def score(self, training, **sampling):
        """A way to sample a training's network; all that is not given is the scale's.

        sampling  samples, steps (as --num-sampling-steps), seed, and perhaps cfg_scale, cfg_channels, cfg_interval,
                  variance ("fixed_small", "fixed_large"): see `experiments.scoring`; of more, `weights` is a name
        """
        sampling = dict(samples=self.scale.samples, steps=self.scale.sampling) | sampling
        name = "-".join(f"{key}-{_word(value)}" for key, value in sampling.items())
        return ScoreTask(self.folder, f"scores/{os.path.basename(training.name)}/{name}", sampling, training,
                     training.cost * _calls(sampling) * sampling["samples"], self.judge)

    def stages(self, name, scores):
        """The pieces of a study with these scores, in lists: the pieces of each need those of the lists before."""
        trainings = {score.training.name: score.training for score in scores}
        counts = sorted({score.sampling["samples"] for score in scores})
        judge = [[self.judge]] if self.judge else []
        return [*judge, [self.reference], list(trainings.values()),
                [*self._shared(name, scores), *(self.yardsticks(count) for count in counts)]]

    def _shared(self, name, scores):
        """These scores in one piece for each worker, with about as much work."""
        scores = {score.name: score for score in scores}.values()  # at guidance scale 1 two ways may be the same
        shares = [[] for _ in range(min(self.workers, len(scores)))]
        for score in sorted(scores, key=lambda score: -score.cost):
            min(shares, key=_cost).append(score)
        return [ScoreBatchTask(self.folder, f"scores/{name}-{number}", share, self._settings(), _cost(share))
                for number, share in enumerate(shares)]

    def judged(self, scores):
        """How samples were judged, for the results of a study: what its scores have in common."""
        scale, (count,) = self.scale, {score.sampling["samples"] for score in scores.values()}
        real = self.yardsticks(count).metadata()
        training = {name: getattr(scale, name) for name in ("steps", "batch_size", "lr", "ema_decay")}
        return dict(features=self.images.features, samples=count, sampling=scale.sampling, training=training,
                    curve_samples=scale.curve_samples, curve_sampling=scale.curve_sampling, real=real["real"],
                    held_out=real["held_out"], made_by=made_by(scores.values()))

    def yardsticks(self, count):
        """The piece that measures real images as if they were samples."""
        return RealImageBaseline(self.folder, f"yardsticks-{count}", count, self._settings(), judge=self.judge)


@dataclass(frozen=True)
class RealImageBaseline(Task):
    """The distance of real images: `count` of those that are trained on, or all, to the held-out ones."""
    folder: str
    name: str
    count: int
    settings: dict
    cost: float = 0
    judge: CommandTask = None

    @property
    def asked(self):
        return dict(count=self.count) | judged_by(self.judge)

    def command(self):
        write_record(self.path + ".request.json", self.settings | dict(path=self.path, asked=self.asked))
        return ["-m", "experiments.scoring", self.path + ".request.json"]

    def finish(self, seconds):
        """Nothing: the process has left the record."""


def curve_of(scores):
    """[[step, distances of the trainings]] of the trainings of some scores, at the steps at which all were measured."""
    curves = [score.training.metadata()["curve"] for score in scores]
    steps = sorted(int(step) for step in set.intersection(*map(set, curves)))
    return [[step, [curve[str(step)] for curve in curves]] for step in steps]


def made_by(scores):
    """[[device, version of torch, commit, day]] of scores and their trainings, each once."""
    pieces = [*{score.training.path: score.training for score in scores}.values(), *scores]
    made = [made for piece in pieces if (made := piece.metadata().get("made"))]
    return sorted([*of] for of in {summarize_environment(record) for record in made})


def summarize_environment(made):
    """What is told of a record of `common.provenance`: device, version of torch, commit, day."""
    return made["device"], made["versions"]["torch"], made["commit"] or "unknown", made["date"][:10]


def _cost(scores):
    return sum(score.cost for score in scores)


def _word(value):
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value:g}" if isinstance(
        value, float) else str(value)


def _calls(sampling):
    """How often the network is asked for an image."""
    return int(str(sampling["steps"]).removeprefix("ddim")) * (2 if sampling.get("cfg_scale", 1) > 1 else 1)


def multiply_adds(network):
    """Of one forward pass for one image: what the paper calls flops. network: arguments of `build_dit`."""
    return _multiply_adds(tuple(network.items()))


def parameters(network):
    """How many are trained."""
    return count_parameters(_on_meta(tuple(network.items())))


@functools.cache
def _multiply_adds(network):
    return int(count_multiply_adds(_on_meta(network)))


@functools.cache
def _on_meta(network):
    with torch.device("meta"):
        return build_dit(**dict(network))
