"""Trainings and scores as tasks, and how much a network computes."""
import contextlib
import functools
import os
from dataclasses import dataclass

import torch

from common.checkpoint_io import latest_checkpoint, list_checkpoints
from common.flops import count_multiply_adds, count_parameters
from evaluation.periodic import read_score_table
from evaluation.records import try_read, write_record
from experiments.jobs import Task
from models import DiT_models
from networks import build_dit
from training.run_dir import list_run_dirs


@dataclass(frozen=True, kw_only=True)
class TrainingTask(Task):
    """A run of train.py that keeps the checkpoints at `kept_steps`; with `has_curve` samples are scored meanwhile.

    `disk_bytes` is the size of these checkpoints.
    """

    kept_steps: list
    has_curve: bool
    disk_bytes: int

    def collect(self):
        """Return the distances over the steps and the last checkpoint; None while the last distance is missing."""
        (run_dir,) = [run_dir for run_dir in list_run_dirs(self.path) if latest_checkpoint(run_dir)]
        curve = {row["step"]: row["frechet_distance"] for row in read_score_table(f"{run_dir}/evaluations.csv")}
        checkpoints, last = list_checkpoints(run_dir), self.kept_steps[-1]
        if self.has_curve and last not in curve:
            return None
        unused = [path for step, path in checkpoints.items() if step not in self.kept_steps]
        for path in (*unused, f"{run_dir}/checkpoints/best.pt"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        return dict(curve=curve, made=try_read(f"{run_dir}/evaluations.json").get("samples", {}).get("made", {}),
                    checkpoint=os.path.relpath(checkpoints[last], self.folder))

    def checkpoint(self, step=None):
        """Return the path of the checkpoint after `step` steps. Default: the last."""
        path = os.path.join(self.folder, self.record()["checkpoint"])
        return os.path.join(os.path.dirname(path), f"{step:07d}.pt") if step else path


@dataclass(frozen=True, kw_only=True)
class ScoreTask(Task):
    """Samples of a `training`, made as `sampling` says, compared with the validation images; without, real images."""

    training: TrainingTask = None
    sampling: dict = None

    def value(self, metric="distance"):
        """Return a number of the finished score."""
        return self.record()["scores"]["frechet_distance" if metric == "distance" else metric]


@dataclass(frozen=True, kw_only=True)
class ScoreBatchTask(Task):
    """Scores of any networks, computed by one process, which writes their records."""

    scores: list

    def command(self):
        """Write down what is missing and return the command that computes it."""
        requests = [dict(path=score.path, asked=score.full_request(), checkpoint=score.training and
                         score.training.checkpoint(score.sampling.get("after")))
                    for score in self.scores if not score.is_done()]
        write_record(self.path + ".request.json", self.request | dict(scores=requests))
        return ["-m", "experiments.score_worker", self.path + ".request.json"]

    def is_done(self):
        """Return whether all scores are."""
        return all(score.is_done() for score in self.scores)

    def seconds(self):
        """Return the time of all scores."""
        return sum(score.record().get("seconds", 0) for score in self.scores)


class StudyContext:
    """Makes the tasks of all studies. The classifier and the reference belong to the data: all presets share them.

    Trainings and scores are kept in a folder of `work_dir`; scores are distributed over `workers` processes.
    """

    def __init__(self, data, preset, work_dir, workers=1):
        self.data, self.preset, self.workers = data, preset, workers
        self.shared_dir = os.path.join(os.path.abspath(work_dir), data.name)
        self.folder = f"{self.shared_dir}-{preset.name}"
        self.features, self.classifier = data.features, None
        if data.features == "classifier":
            self.classifier = self._file_task("classifier", "classifier.pt", "-m", "tools.train_classifier",
                                              *data.flags)
            self.features = self.classifier.output
        self.reference = self._file_task("reference", "held-out.npz", "evaluate.py", "--make-reference",
                                         f"{data.name}-held-out", "--features", self.features)

    def _file_task(self, name, file_name, *argv):
        argv = [*map(str, argv), "--output", os.path.join(self.shared_dir, file_name)]
        # The request has paths by their last names: the folder may be moved.
        request = dict(arguments=[os.path.basename(word) if os.path.isabs(word) else word for word in argv])
        return Task(folder=self.shared_dir, name=name, request=request, argv=tuple(argv), output=argv[-1],
                    classifier=self.classifier)

    def network(self, size=None, patch=None, conditioning="adaln-zero"):
        """Return the arguments of `networks.build_dit`. Default: the preset's network."""
        size, patch = size or self.preset.network[0], patch or self.preset.network[1]
        depth, hidden_size, num_heads = self.preset.sizes[size]
        return dict(input_size=self.data.image_size, patch_size=patch, in_channels=self.data.channels,
                    hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_classes=self.data.num_classes,
                    conditioning=conditioning)

    def training(self, seed, size=None, patch=None, conditioning="adaln-zero", decays=()):
        """Return the training of a network. Default: the preset's network, which several studies share.

        With further `decays` of the EMA the snapshots are kept, and no curve is measured.
        """
        preset, size, patch = self.preset, size or self.preset.network[0], patch or self.preset.network[1]
        model, (depth, width, heads) = f"DiT-{size}/{patch}", preset.sizes[size]
        flags = [*self.data.flags, "--vae", "none", "--num-workers", self.data.num_workers, "--model",
                 model if model in DiT_models else "DiT-S/2", "--depth", depth, "--hidden-size", width,
                 "--num-heads", heads, "--patch-size", patch,
                 *(["--conditioning", conditioning] if conditioning != "adaln-zero" else []),
                 "--global-batch-size", preset.batch_size, "--lr", preset.lr, "--ema-decay", preset.ema_decay, *decays,
                 "--global-seed", seed]
        name, kept_steps = f"trainings/{size}-{patch}-{conditioning}-seed-{seed}", [preset.steps]
        options = ["--ckpt-every", preset.curve_every, "--keep-checkpoints", 1, "--eval-every", preset.curve_every,
                   "--eval-samples", preset.curve_samples, "--eval-sampling-steps", preset.curve_sampling,
                   "--eval-features", self.features, "--eval-reference", self.reference.output]
        if decays:
            name, kept_steps = f"ema_decay/{size}-{patch}-seed-{seed}", preset.snapshot_steps
            options = ["--ckpt-every", kept_steps[0]]
        options += ["--log-every", preset.curve_every, *(["--fast"] if preset.fast else [])]
        argv = ["train.py", *flags, *options, "--max-steps", preset.steps, "--resume", "auto", "--results-dir",
                os.path.join(self.folder, name)]
        cost = network_cost(self.network(size, patch, conditioning))
        # float32: weights, EMAs and Adam's two moments
        disk_bytes = len(kept_steps) * 4 * (4 + len(decays)) * cost["parameters"]
        return TrainingTask(folder=self.folder, name=name, argv=tuple(argv), classifier=self.classifier,
                            request=dict(train=[str(flag) for flag in flags], steps=preset.steps),
                            cost=cost["multiply_adds"] * preset.steps, disk_bytes=disk_bytes,
                            kept_steps=kept_steps, has_curve=not decays)

    def score(self, training, **sampling):
        """Return the score of a trained network.

        `sampling`: seed; samples and steps (as --num-sampling-steps) unless they are the preset's; optionally
        cfg_scale, cfg_channels, cfg_interval, variance ("fixed_small", "fixed_large"), after (training steps), decay.
        """
        sampling = dict(samples=self.preset.samples, steps=self.preset.sampling) | sampling
        passes = int(str(sampling["steps"]).removeprefix("ddim")) * (2 if sampling.get("cfg_scale", 1) > 1 else 1)
        words = "-".join(f"{key}-{_format_word(value)}" for key, value in sampling.items())
        return ScoreTask(folder=self.folder, name=f"scores/{os.path.basename(training.name)}/{words}",
                         request=dict(training=training.request) | sampling, training=training, sampling=sampling,
                         classifier=self.classifier, cost=training.cost * passes * sampling["samples"])

    def real_image_baseline(self, count):
        """Return the score of `count` real training images, or of all: what samples could reach at best."""
        return ScoreTask(folder=self.folder, name=f"real-images-{count}", request=dict(real_images=count),
                         classifier=self.classifier)

    def stages(self, name, scores):
        """Return the tasks of a study with these scores: lists, each of which needs those before it."""
        trainings = {score.training.name: score.training for score in scores}
        counts = sorted({score.sampling["samples"] for score in scores})
        unique = {score.name: score for score in scores}.values()  # at guidance scale 1 two settings may be the same
        batches = [[] for _ in range(self.workers)]
        for score in sorted([*unique, *map(self.real_image_baseline, counts)], key=lambda score: -score.cost):
            min(batches, key=lambda batch: sum(score.cost for score in batch)).append(score)
        request = dict(images=self.data.name, features=self.features, reference=self.reference.output,
                       batch=self.preset.sample_batch, fast=self.preset.fast)
        tasks = [ScoreBatchTask(folder=self.folder, name=f"scores/{name}-{i}", request=request, scores=batch)
                 for i, batch in enumerate(batches) if batch]
        return [*([[self.classifier]] if self.classifier else []), [self.reference], list(trainings.values()), tasks]

    def metadata(self, scores):
        """Return how networks were trained and samples were scored, for the results of a study."""
        preset, (count,) = self.preset, {score.sampling["samples"] for score in scores}
        baseline = self.real_image_baseline(count).record()
        training = {name: getattr(preset, name) for name in ("steps", "batch_size", "lr", "ema_decay")}
        tasks = [*{score.training.path: score.training for score in scores}.values(), *scores]
        made_by = {summarize_environment(made) for task in tasks if (made := task.record().get("made"))}
        return dict(features=self.data.features, samples=count, sampling=preset.sampling, training=training,
                    curve_samples=preset.curve_samples, curve_sampling=preset.curve_sampling, real=baseline["real"],
                    held_out=baseline["held_out"], made_by=sorted(made_by))


def summarize_environment(record):
    """Return (device, version of torch, commit, day) of a record of `collect_environment`."""
    return record["device"], record["versions"]["torch"], record["commit"] or "unknown", record["date"][:10]


def _format_word(value):
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def network_cost(network):
    """Return dict(parameters, multiply_adds), the latter of a forward pass of one image.

    Args:
        network (dict): Arguments of `networks.build_dit`.
    """
    return dict(_network_cost(tuple(network.items())))


@functools.cache
def _network_cost(network):
    with torch.device("meta"):
        model = build_dit(**dict(network))
    return dict(parameters=count_parameters(model), multiply_adds=int(count_multiply_adds(model)))
