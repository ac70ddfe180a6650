"""Scores of a run's EMA samples while it trains. They are watched, never acted on: training does not depend on them."""
import csv
import io
import os
import time

from runtime import processes
from runtime.errors import UserError
from runtime.whole_file import whole_file

from . import records, scores
from .features import open_features
from .measure import measure
from .reference import open_reference
from .sources import GeneratedImages


def open_evaluator(accelerator, features, reference, make, num_classes, count, seed, batch_size, image_size, made_of,
                   **more):
    """An `Evaluator`. To be called by all processes.

    features, reference  what --eval-features and --eval-reference say
    make                 an `ImageMaker` of the EMA model
    count, seed          of the samples
    batch_size           of each process
    image_size           pixels, where the reference is a folder of images
    made_of              what is to be recorded of the samples beside how they are made, a plain dictionary
    more                 what else an `Evaluator` takes
    """
    with processes.together(accelerator):
        space = open_features(features, accelerator.device)
    images = GeneratedImages(make, num_classes, count, seed, made_of=made_of)
    found = open_reference(accelerator, reference, space, batch_size, image_size)
    return Evaluator(accelerator, images, space, found, batch_size, **more)


class Evaluator:
    """Makes samples of a model at some steps, measures them, and remembers which step was the best.

    accelerator  all processes take part
    images       `GeneratedImages` of the EMA model: the same seeds and labels every time
    features     the feature space, with the `reference` in it: as `open_reference` gives them
    folder       the experiment's: `evaluations.csv` has a row a time, `evaluations.json` says what was measured
    first_step   where this run begins; later rows, of a run that it goes back behind, are dropped
    warn         called with a sentence where a file cannot be written
    """

    def __init__(self, accelerator, images, features, reference, batch_size, folder, first_step, warn):
        self.accelerator, self.images, self.features, self.batch_size = accelerator, images, features, batch_size
        self.reference, self.reference_record = reference
        self.csv, self.warn = os.path.join(folder, "evaluations.csv"), warn
        self.name = scores.main_score(features)
        self.rows = [row for row in read_rows(self.csv) if row["step"] <= first_step]

    def __call__(self, step, stopped=lambda: False):
        """Measure the samples of now. To be called by all processes.

        return  the scores (on the main process; else an empty dictionary), and whether they are the best so far (alike
                on all processes); None where a process was told to stop
        """
        start = time.perf_counter()
        found = measure(self.accelerator, self.images, self.features, self.batch_size, stopped=stopped,
                        title=f"evaluation at step {step}")
        if found is None:
            return None
        return processes.on_main(self.accelerator, lambda: self._score(step, found, start))

    def _score(self, step, found, start):
        row = scores.score(found, self.reference, self.features)
        best = min((row[self.name] for row in self.rows if self.name in row), default=float("inf"))
        self.rows.append(dict(step=step, images=found.count, **row, seconds=round(time.perf_counter() - start, 1)))
        self._write()
        return row, row[self.name] < best

    def description(self):
        """What is measured, in a line."""
        distance = scores.distance_name(self.features, len(self.images))
        made = self.images.make.record()
        return (f"{distance} of EMA samples ({made['sampler']}, {made['steps']} steps, guidance {made['cfg_scale']:g}) "
                f"to {self.reference_record['path']}")

    def _write(self):
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        record = dict(features=self.features.record(), samples=self.images.record(), reference=self.reference_record)
        try:
            with whole_file(self.csv) as file:
                file.write(text.getvalue().encode())
            records.write_record(os.path.splitext(self.csv)[0] + ".json", record)
        except UserError as error:
            self.warn(f"WARNING: {error}; training goes on")


def read_rows(path):
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
