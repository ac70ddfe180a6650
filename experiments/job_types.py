"""Trainings and scores as tasks, and how much a network computes."""
import contextlib
import functools
import os
from dataclasses import dataclass

import torch

import models
from common.checkpoint_io import latest_checkpoint, list_checkpoints
from common.files import sha256_file
from common.flops import count_multiply_adds, count_parameters
from evaluation.periodic import read_score_table
from evaluation.records import try_read, write_record
from experiments.jobs import Task
from experiments.presets import StudyData, StudyPreset
from training.run_dir import list_run_dirs

_METRICS = {"distance": "frechet_distance"}  # names in the results, where they differ from those of evaluate.py


@dataclass(frozen=True, kw_only=True)
class FileTask(Task):
    """A command that makes the file `output`."""

    output: str

    def is_done(self):
        return super().is_done() and os.path.exists(self.output)

    def collect(self):
        return dict(sha256=sha256_file(self.output)) if os.path.exists(self.output) else None


@dataclass(frozen=True, kw_only=True)
class TrainingTask(Task):
    """A run of train.py.

    Attributes:
        steps (int): Optimizer steps.
        disk_bytes (int): Size of the checkpoints that it keeps.
        has_curve (bool): Whether samples are scored during training.
    """

    steps: int
    disk_bytes: int = 0
    has_curve: bool = True

    def collect(self):
        """Return the distances over the steps and the last checkpoint; None while the last score is missing."""
        (run_dir,) = [run_dir for run_dir in list_run_dirs(self.path) if latest_checkpoint(run_dir)]
        curve = {row["step"]: row["frechet_distance"] for row in read_score_table(f"{run_dir}/evaluations.csv")}
        if self.has_curve and self.steps not in curve:
            return None
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{run_dir}/checkpoints/best.pt")
        return dict(curve=curve, made=try_read(f"{run_dir}/evaluations.json").get("samples", {}).get("made", {}),
                    checkpoint=os.path.relpath(list_checkpoints(run_dir)[self.steps], self.folder))

    def checkpoint(self, step=None):
        """Return the path of the checkpoint after `step` steps. Default: the last."""
        path = os.path.join(self.folder, self.record()["checkpoint"])
        return os.path.join(os.path.dirname(path), f"{step:07d}.pt") if step else path


@dataclass(frozen=True, kw_only=True)
class ScoreTask(Task):
    """Samples of a trained network, or real images, compared with the validation images. A `ScoreBatchTask` runs it.

    Attributes:
        training (TrainingTask): The network; None: real images.
        sampling (dict): How the network is sampled: samples, steps, seed, and what else `score_worker` knows.
    """

    training: TrainingTask = None
    sampling: dict = None

    def worker_request(self):
        """Return what the worker needs to know."""
        request = dict(path=self.path, asked=self.full_request())
        return request | (dict(checkpoint=self.training.checkpoint(self.sampling.get("after"))) if self.training else {})

    def value(self, metric="distance"):
        """Return a number of the finished score."""
        return self.record()["scores"][_METRICS.get(metric, metric)]


@dataclass(frozen=True, kw_only=True)
class ScoreBatchTask(Task):
    """Scores of any networks, computed by one process."""

    scores: list

    def command(self):
        path = self.path + ".request.json"
        missing = [score.worker_request() for score in self.scores if not score.is_done()]
        write_record(path, self.request | dict(scores=missing))
        return ["-m", "experiments.score_worker", path]

    def is_done(self):
        return all(score.is_done() for score in self.scores)

    def seconds(self):
        return sum(score.record().get("seconds", 0) for score in self.scores)


class StudyContext:
    """Makes the tasks of all studies with a data set and a preset.

    The classifier and the statistics of the validation images belong to the data set: all presets share them.

    Args:
        data (StudyData): The data set.
        preset (StudyPreset): How large the studies are.
        work_dir (str): Where trainings and scores are kept.
        workers (int): Number of processes that scores are distributed over.
    """

    def __init__(self, data: StudyData, preset: StudyPreset, work_dir, workers=1):
        work_dir = os.path.abspath(work_dir)
        self.data, self.preset, self.workers = data, preset, workers
        self.folder = os.path.join(work_dir, f"{data.name}-{preset.name}")
        shared_dir = os.path.join(work_dir, data.name)
        self.features, self.classifier = data.features, None
        if data.features == "classifier":
            self.features = os.path.join(shared_dir, "classifier.pt")
            self.classifier = _file_task(shared_dir, "classifier", self.features, None,
                                         "-m", "tools.train_classifier", *data.flags)
        self.reference = _file_task(shared_dir, "reference", os.path.join(shared_dir, "held-out.npz"), self.classifier, "evaluate.py", "--make-reference",
                                    f"{data.name}-held-out", "--features", self.features)

    def network(self, size, patch):
        """Return the arguments of `models.DiT` for a size of the preset."""
        depth, hidden_size, num_heads = self.preset.sizes[size]
        return dict(input_size=self.data.image_size, patch_size=patch, in_channels=self.data.channels,
                    hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_classes=self.data.num_classes)

    def training(self, size, patch, seed, conditioning="adaln-zero", decays=()):
        """Return the training of a network. All studies share the default one.

        Args:
            size (str): A name in `preset.sizes`.
            patch (int): Patch size.
            seed (int): Seed of weights, data order and noise.
            conditioning (str): Block type.
            decays (tuple[float]): Further decays of the EMA. With them the snapshots are kept, and no curve is measured.
        """
        preset, name, (depth, width, heads) = self.preset, f"DiT-{size}/{patch}", self.preset.sizes[size]
        network = self.network(size, patch) | dict(conditioning=conditioning)
        flags = [*self.data.flags, "--vae", "none", "--num-workers", self.data.num_workers, "--model",
                 name if name in models.DiT_models else "DiT-S/2", "--depth", depth, "--hidden-size", width,
                 "--num-heads", heads, "--patch-size", patch]
        flags += ["--conditioning", conditioning] if conditioning != "adaln-zero" else []
        flags += ["--global-batch-size", preset.batch_size, "--lr", preset.lr, "--ema-decay", preset.ema_decay, *decays,
                  "--global-seed", seed]
        if decays:
            name, checkpoints = f"ema_decay/{size}-{patch}-seed-{seed}", len(self.snapshot_steps())
            options = ["--ckpt-every", self.snapshot_steps()[0]]
        else:
            name, checkpoints = f"trainings/{size}-{patch}-{conditioning}-seed-{seed}", 1
            options = ["--ckpt-every", preset.curve_every, "--keep-checkpoints", 1, "--eval-every", preset.curve_every,
                       "--eval-samples", preset.curve_samples, "--eval-sampling-steps", preset.curve_sampling,
                       "--eval-features", self.features, "--eval-reference", self.reference.output]
        options += ["--log-every", preset.curve_every, *(["--fast"] if preset.fast else [])]
        argv = ["train.py", *flags, *options, "--max-steps", preset.steps, "--resume", "auto", "--results-dir",
                os.path.join(self.folder, name)]
        cost = network_cost(network)
        bytes_per_parameter = 4 * (4 + len(decays))  # weights, EMAs and Adam's two moments, in float32
        return TrainingTask(
            folder=self.folder, name=name, argv=tuple(argv), steps=preset.steps, has_curve=not decays,
            request=dict(train=[str(flag) for flag in flags], steps=preset.steps), classifier=self.classifier,
            cost=cost["multiply_adds"] * preset.steps,
            disk_bytes=checkpoints * bytes_per_parameter * cost["parameters"])

    def snapshot_steps(self):
        """Return the steps after which `ema_decay` samples, in order."""
        return sorted({max(1, round(share * self.preset.steps)) for share in self.preset.snapshots})

    def score(self, training, **sampling):
        """Return the score of a trained network.

        Args:
            training (TrainingTask): The network.
            **sampling: Overrides the preset's samples and steps (as --num-sampling-steps); seed; optionally cfg_scale,
                cfg_channels, cfg_interval, variance ("fixed_small", "fixed_large"), after (training steps), decay.
        """
        sampling = dict(samples=self.preset.samples, steps=self.preset.sampling) | sampling
        passes = int(str(sampling["steps"]).removeprefix("ddim")) * (2 if sampling.get("cfg_scale", 1) > 1 else 1)
        name = "-".join(f"{key}-{_format_word(value)}" for key, value in sampling.items())
        return ScoreTask(folder=self.folder, name=f"scores/{os.path.basename(training.name)}/{name}",
                         request=dict(training=training.request) | sampling, training=training, sampling=sampling,
                         classifier=self.classifier, cost=training.cost * passes * sampling["samples"])

    def real_image_baseline(self, count):
        """Return the score of `count` real training images, or of all: what samples could reach at best."""
        return ScoreTask(folder=self.folder, name=f"real-images-{count}", request=dict(real_images=count),
                         classifier=self.classifier)

    def stages(self, name, scores):
        """Return the tasks of a study with these scores: lists, each of which needs those before it."""
        trainings = {score.training.name: score.training for score in scores}
        baselines = [self.real_image_baseline(count) for count in sorted({score.sampling["samples"] for score in scores})]
        unique = {score.name: score for score in scores}.values()  # at guidance scale 1 two settings may be the same
        return [*([[self.classifier]] if self.classifier else []), [self.reference], list(trainings.values()),
                self._score_batches(name, [*unique, *baselines])]

    def _score_batches(self, name, scores):
        """Distribute scores over the workers, about the same cost each."""
        batches = [[] for _ in range(min(self.workers, len(scores)))]
        for score in sorted(scores, key=lambda score: -score.cost):
            min(batches, key=_total_cost).append(score)
        request = dict(images=self.data.name, features=self.features, reference=self.reference.output,
                       batch=self.preset.sample_batch, fast=self.preset.fast)
        return [ScoreBatchTask(folder=self.folder, name=f"scores/{name}-{number}", request=request, scores=batch,
                               cost=_total_cost(batch)) for number, batch in enumerate(batches)]

    def metadata(self, scores):
        """Return how networks were trained and samples were scored, for the results of a study."""
        preset, (count,) = self.preset, {score.sampling["samples"] for score in scores}
        baseline = self.real_image_baseline(count).record()
        training = {name: getattr(preset, name) for name in ("steps", "batch_size", "lr", "ema_decay")}
        return dict(features=self.data.features, samples=count, sampling=preset.sampling, training=training,
                    curve_samples=preset.curve_samples, curve_sampling=preset.curve_sampling, real=baseline["real"],
                    held_out=baseline["held_out"], made_by=_list_environments(scores))


def _file_task(folder, name, output, classifier, *argv):
    # Paths by their last names: the folder may be moved.
    arguments = [os.path.basename(word) if os.path.isabs(word) else word for word in map(str, (*argv, "--output", output))]
    return FileTask(folder=folder, name=name, request=dict(arguments=arguments), argv=(*argv, "--output", output),
                    output=output, classifier=classifier)


def merge_curves(scores):
    """Return [[step, distances of the seeds]] of the scores' trainings, at the steps at which all were measured."""
    curves = [score.training.record()["curve"] for score in scores]
    steps = sorted(int(step) for step in set.intersection(*map(set, curves)))
    return [[step, [curve[str(step)] for curve in curves]] for step in steps]


def _list_environments(scores):
    """Return [[device, version of torch, commit, day]] of scores and their trainings, each once."""
    tasks = [*{score.training.path: score.training for score in scores}.values(), *scores]
    records = [made for task in tasks if (made := task.record().get("made"))]
    return sorted(list(environment) for environment in {summarize_environment(record) for record in records})


def summarize_environment(record):
    """Return (device, version of torch, commit, day) of a record of `collect_environment`."""
    return record["device"], record["versions"]["torch"], record["commit"] or "unknown", record["date"][:10]


def _total_cost(scores):
    return sum(score.cost for score in scores)


def _format_word(value):
    if isinstance(value, (list, tuple)):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def network_cost(network):
    """Return what a network costs: dict(parameters, multiply_adds), the latter of a forward pass for one image.

    Args:
        network (dict): Arguments of `models.DiT`.
    """
    return dict(_network_cost(tuple(network.items())))


@functools.cache
def _network_cost(network):
    with torch.device("meta"):
        model = models.DiT(**dict(network))
    return dict(parameters=count_parameters(model), multiply_adds=int(count_multiply_adds(model)))
