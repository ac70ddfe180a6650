"""Scores of a run's EMA samples while it trains. They are watched, never acted on: training does not depend on them."""

import csv
import io
import os
import time

from common import distributed
from common.checkpoint_io import load_checkpoint
from common.errors import UserError
from common.files import atomic_write
from evaluation.feature_statistics import compute_statistics
from evaluation.features import load_feature_space
from evaluation.records import free_path, try_read, write_record
from evaluation.reference import open_reference
from evaluation.scores import check_comparable, compute_scores, distance_name, primary_score, score_warnings


def build_evaluator(features, reference, images, batch_size, image_size):
    """An `PeriodicEvaluator`. To be called by all processes.

    features, reference  what --eval-features and --eval-reference say
    images               `GeneratedImages` of the EMA model
    batch_size           of each process
    image_size           pixels, where the reference is a folder of images, or fractals
    raise                UserError for whatever would go wrong at the first evaluation
    """
    with distributed.raise_on_all_ranks():
        space = load_feature_space(features, distributed.device())
    found, record = open_reference(reference, space, batch_size, image_size, images.num_classes)
    with distributed.raise_on_all_ranks():
        check_comparable(images, found, space)
    return PeriodicEvaluator(images, space, found, record, batch_size)


class PeriodicEvaluator:
    """Makes samples of a model at some steps, measures them, and remembers which step was the best.

    In the experiment's folder, `evaluations.csv` has a row a time, `evaluations.json` says what was measured, and
    `checkpoints/best.pt` is the state of the best step. A run that goes on with other settings begins new tables.
    """

    def __init__(self, images, features, reference, reference_record, batch_size):
        self.images, self.features, self.batch_size = images, features, batch_size
        self.reference, self.reference_record = reference, reference_record
        self.name = primary_score(features)
        self.rows, self.best = [], float("inf")

    def begin(self, folder, first_step, log):
        """Begin or go on with the tables in an experiment's folder; rows of later steps than first_step are dropped.

        log  called with a line on what is measured, and with warnings
        """
        self.log = log
        self.csv, self.json = (os.path.join(folder, f"evaluations.{ending}") for ending in ("csv", "json"))
        if distributed.is_rank0():
            log(self.description())
            size = self.images.noise_like(1).shape[1:3]
            for warning in score_warnings(len(self.images), size, self.reference):
                log(warning)
            self._go_on(first_step, os.path.join(folder, "checkpoints", "best.pt"))

    def _go_on(self, first_step, best_path):
        """Take over the rows of an earlier run up to first_step, if they measured the same."""
        settings = try_read(self.json).get("settings")
        if settings not in (None, self.settings()):
            aside = free_path(os.path.splitext(self.csv)[0] + "-before", ".csv")
            self.log(f"WARNING: evaluations are not made as before; {aside} holds the earlier ones")
            for old, new in ((self.csv, aside), (self.json, os.path.splitext(aside)[0] + ".json")):
                if os.path.exists(old):
                    os.replace(old, new)
            return
        self.rows = [row for row in read_score_table(self.csv) if row["step"] <= first_step]
        try:
            best_step = load_checkpoint(best_path).get("step")
        except (UserError, AttributeError):
            best_step = None  # then the next one is the best
        self.best = next((row[self.name] for row in self.rows if row["step"] == best_step and self.name in row),
                         float("inf"))

    def settings(self):
        """What must be equal for two scores to be compared; plain values."""
        reference = {name: value for name, value in self.reference_record.items() if name not in ("path", "source")}
        return dict(features=self.features.metadata(), reference=reference or self.reference_record,
                    samples=dict(images=len(self.images), labels=self.images.labels, seed=self.images.seed,
                                 **self.images.make.metadata()))

    def lacks(self, step):
        """Whether a step that is done was not measured. To be called by all processes."""
        return distributed.run_on_rank0_and_broadcast(lambda: all(row["step"] != step for row in self.rows))

    def __call__(self, step, keep_best, stopped=lambda: False):
        """Measure the samples of now. To be called by all processes.

        keep_best  called by all processes where the samples are the best so far; returns a path
        stopped    asked whether to give up
        return     the scores (an empty dictionary but on the main process); None where it was given up
        """
        start, self.images.stopped = time.perf_counter(), stopped
        found = compute_statistics(self.images, self.features, self.batch_size, stopped=stopped,
                        title=f"evaluation at step {step}")
        if found is None:
            return None
        row, is_best = distributed.run_on_rank0_and_broadcast(lambda: self._score(found))
        if is_best:
            path = keep_best()
            self.best = row[self.name]
            self.log(f"(step={step:07d}) the best so far, kept as {path}")
        if distributed.is_rank0():  # last, so that a kill never leaves a row without its checkpoint
            seconds = round(time.perf_counter() - start, 1)
            self.rows = [old for old in self.rows if old["step"] != step]
            self.rows.append(dict(step=step, images=found.count, **row, seconds=seconds))
            self._write()
        return row

    def _score(self, found):
        row = compute_scores(found, self.reference, self.features, self.images.class_labels())
        return row, row[self.name] < self.best

    def description(self):
        """What is measured, and what it costs, in a line."""
        distance = distance_name(self.features, len(self.images))
        made = self.images.make.metadata()
        return (f"Evaluation: {distance} of EMA samples ({made['sampler']}, {made['steps']} steps, guidance "
                f"{made['cfg_scale']:g}) to {self.reference_record['path']}; each time "
                f"{len(self.images) * made['model_calls']:,} images pass the network")

    def _write(self):
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        try:
            with atomic_write(self.csv) as file:
                file.write(text.getvalue().encode())
            write_record(self.json, dict(settings=self.settings(), features=self.features.metadata(),
                                                 samples=self.images.metadata(), reference=self.reference_record))
        except UserError as error:
            self.log(f"WARNING: {error}; training goes on")


def read_score_table(path):
    """The rows of an `evaluations.csv` as dictionaries of numbers; what cannot be read is left out."""
    rows = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    rows.append({name: int(value) if name in ("step", "images") else float(value)
                                 for name, value in row.items() if name and value})
                except (ValueError, TypeError):
                    continue
    except (OSError, csv.Error, UnicodeDecodeError):
        return []
    return [row for row in rows if "step" in row]
