"""Scores of EMA samples while a run trains. They are only reported: training does not depend on them."""
import contextlib
import csv
import io
import os
import time

from common import distributed
from common.checkpoint_io import load_checkpoint
from common.errors import ArgumentError, UserError
from common.files import atomic_write
from data.builtin import parse_builtin_name
from evaluation.feature_statistics import compute_statistics
from evaluation.features import load_feature_space
from evaluation.records import free_path, try_read, write_record
from evaluation.reference import open_reference
from evaluation.scores import check_comparable, compute_scores, distance_name, primary_score, score_warnings


def build_evaluator(features, reference, images, batch_size, image_size):
    """Build a `PeriodicEvaluator`, after checking all that its first evaluation needs. Call it on all ranks.

    `features` are a name that `load_feature_space` takes, the reference one that `open_reference` takes with
    `image_size`, the images `GeneratedImages` of the EMA model. Batches are of each rank.

    Raises:
        UserError: If an evaluation would fail; `ArgumentError` for features, reference and num_fid_samples.
    """
    with distributed.raise_on_all_ranks():
        if not os.path.exists(reference) and not parse_builtin_name(reference)[0]:  # before Inception is downloaded
            raise ArgumentError("there is no such file, folder or built-in data set", reference=reference)
        space = load_feature_space(features, distributed.device())
    statistics, metadata = open_reference(reference, space, batch_size, image_size, images.num_classes)
    with distributed.raise_on_all_ranks():
        check_comparable(images, statistics, space)
    return PeriodicEvaluator(images, space, statistics, metadata, batch_size)


class PeriodicEvaluator:
    """Samples a model at some steps, scores the samples, and keeps track of the best step.

    In the run folder `evaluations.csv` has a row per evaluation, `evaluations.json` describes what was measured, and
    `checkpoints/best.pt` is the state of the best step. A run that is resumed with other settings begins new tables.
    `build_evaluator` makes one.
    """

    def __init__(self, images, features, reference, reference_metadata, batch_size):
        self.images, self.features, self.batch_size = images, features, batch_size
        self.reference, self.reference_metadata = reference, reference_metadata
        self.score_name = primary_score(features)
        self.rows, self.best_score = [], float("inf")

    def begin(self, folder, start_step, log):
        """Start the tables in a run folder, or continue those of an earlier run up to `start_step`.

        `log` is called with lines about what is measured, and with warnings.
        """
        self.log = log
        self.csv_path, self.json_path = (os.path.join(folder, f"evaluations.{name}") for name in ("csv", "json"))
        if distributed.is_rank0():
            size = self.images.example_batch().shape[1:3]
            for line in (self.description(), *score_warnings(len(self.images), size, self.reference)):
                log(line)
            self._read_rows(start_step, os.path.join(folder, "checkpoints", "best.pt"))

    def _read_rows(self, start_step, best_path):
        """Read the rows of an earlier run up to `start_step`; move its tables aside if its settings differ."""
        if try_read(self.json_path).get("settings") not in (None, self.settings()):
            aside = free_path(self.csv_path.removesuffix(".csv") + "-before", ".csv")
            self.log(f"WARNING: the settings of the evaluation have changed; {aside} holds the earlier scores")
            for old, new in ((self.csv_path, aside), (self.json_path, aside.removesuffix(".csv") + ".json")):
                if os.path.exists(old):
                    os.replace(old, new)
            return
        self.rows = [row for row in read_score_table(self.csv_path) if row["step"] <= start_step]
        try:
            best_step = load_checkpoint(best_path).get("step")
        except (UserError, AttributeError):
            return  # then the next evaluation is the best
        scores = {row["step"]: row[self.score_name] for row in self.rows if self.score_name in row}
        self.best_score = scores.get(best_step, float("inf"))

    def settings(self):
        """Return what must be equal for two scores to be comparable, as plain values."""
        reference = {name: value for name, value in self.reference_metadata.items() if name not in ("path", "source")}
        return dict(features=self.features.metadata(), reference=reference or self.reference_metadata,
                    samples=dict(images=len(self.images), labels=self.images.labels, seed=self.images.seed,
                                 **self.images.pipeline.metadata()))

    def lacks(self, step):
        """Return whether there is no row of this step. Call it on all ranks."""
        return distributed.run_on_rank0_and_broadcast(lambda: all(row["step"] != step for row in self.rows))

    def __call__(self, step, keep_best, stopped=lambda: False):
        """Sample the model at a step and return its scores, or None if the ranks gave up. Call it on all ranks.

        `keep_best`, () -> path, is called on all ranks if the score is the best so far; `stopped`, () -> bool, often:
        whether to give up.
        """
        start, self.images.stopped = time.perf_counter(), stopped
        samples = compute_statistics(self.images, self.features, self.batch_size, stopped=stopped,
                                     title=f"evaluation at step {step}")
        if samples is None:
            return None
        scores, is_best = distributed.run_on_rank0_and_broadcast(lambda: self._score(samples))
        if is_best:
            path = keep_best()
            self.best_score = scores[self.score_name]
            self.log(f"(step={step:07d}) the best so far, kept as {path}")
        if distributed.is_rank0():  # after the checkpoint, so that a kill never leaves a row without it
            seconds = round(time.perf_counter() - start, 1)
            self.rows = [row for row in self.rows if row["step"] != step]
            self.rows.append(dict(step=step, images=samples.count, **scores, seconds=seconds))
            self._write_tables()
        return scores

    def _score(self, samples):
        scores = compute_scores(samples, self.reference, self.features, self.images.class_labels())
        return scores, scores[self.score_name] < self.best_score

    def description(self):
        """Return a line about what is measured, and what it costs."""
        sampling = self.images.pipeline.metadata()
        return (f"Evaluation: {distance_name(self.features, len(self.images))} of EMA samples ({sampling['sampler']}, "
                f"{sampling['steps']} steps, guidance {sampling['cfg_scale']:g}) to {self.reference_metadata['path']}; "
                f"{len(self.images) * sampling['model_calls']:,} forward passes of one image each time")

    def _write_tables(self):
        text = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        try:
            with atomic_write(self.csv_path) as file:
                file.write(text.getvalue().encode())
            write_record(self.json_path, dict(settings=self.settings(), features=self.features.metadata(),
                                              samples=self.images.metadata(), reference=self.reference_metadata))
        except UserError as error:
            self.log(f"WARNING: {error}; training continues")


def read_score_table(path):
    """Read the rows of an `evaluations.csv` as dicts of numbers; unreadable ones are left out."""
    rows = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                with contextlib.suppress(ValueError, TypeError):
                    rows.append({name: int(value) if name in ("step", "images") else float(value)
                                 for name, value in row.items() if name and value})
    except (OSError, csv.Error, UnicodeDecodeError):
        return []
    return [row for row in rows if "step" in row]
