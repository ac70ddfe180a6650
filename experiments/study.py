"""A study: which networks it samples and how, and how its results are shown and judged."""
from collections.abc import Callable
from dataclasses import dataclass

from experiments.job_types import network_cost
from experiments.statistics import format_mean_std


@dataclass(frozen=True)
class Study:
    """A study of the paper, declared by a module of this package.

    Attributes:
        name (str): Name of its module.
        title (str): Title of its picture.
        rows (Callable): (preset, data) -> iterable of (fields, training, sampling): what describes a row of the
            results, arguments of `StudyContext.training` and of `StudyContext.score`; all seeds share them.
        columns (dict | Callable): {heading: function of a row}, or (results) -> (rows, such a dictionary).
        draw (Callable): (results) -> matplotlib figure.
        claims (Callable): (results) -> iterable of (claim, the paper, here, verdict).
        x_heading (Callable): If a row is a function of x: the heading of x in the table. `sampling` is then
            {x: arguments}, and the row's distance a list of pairs (x, values of the seeds).
        metrics (tuple[str]): Otherwise, what is stored of a row; "curve" is the distance over training.
        sampled (str): How samples are made; {} stands for the preset's sampler.
        seeds (str): Field of the preset with the seeds.
        summarize (Callable): (rows of the results) -> further fields of the results.
    """

    name: str
    title: str
    rows: Callable
    columns: dict | Callable
    draw: Callable
    claims: Callable
    x_heading: Callable = None
    metrics: tuple = ("distance",)
    sampled: str = "Samples without guidance, by {}"
    seeds: str = "seeds"
    summarize: Callable = lambda rows: {}

    def scores(self, context):
        """Yield the fields of each row and its scores: those of the seeds, or {x: those of the seeds}."""
        def of_seeds(sampling):
            return [context.score(training, seed=seed, **sampling) for seed, training in trainings.items()]

        for fields, training, sampling in self.rows(context.preset, context.data):
            trainings = {seed: context.training(seed, **training) for seed in getattr(context.preset, self.seeds)}
            network = {name: value for name, value in training.items() if name != "decays"}
            yield (fields | network_cost(context.network(**network)),
                   {x: of_seeds(sampling[x]) for x in sampling} if self.x_heading else of_seeds(sampling))

    def list_scores(self, context):
        """Return all scores; the trainings follow from them."""
        groups = [scores.values() if self.x_heading else [scores] for _, scores in self.scores(context)]
        return [score for group in groups for seeds in group for score in seeds]

    def collect_results(self, context):
        """Return the results as plain values, once all scores are done."""
        rows = [fields | self._measured(scores) for fields, scores in self.scores(context)]
        network = "{}/{}".format(*context.preset.network)
        return (dict(seeds=getattr(context.preset, self.seeds), network=network, rows=rows) | self.summarize(rows)
                | context.metadata(self.list_scores(context)))

    def _measured(self, scores):
        if self.x_heading:
            return dict(distance=[[x, [score.value() for score in seeds]] for x, seeds in scores.items()])
        return {name: _merge_curves(scores) if name == "curve" else [score.value(name) for score in scores]
                for name in self.metrics}

    def table(self, results):
        """Return rows of strings, headings first."""
        rows, columns = self.columns(results) if callable(self.columns) else (results["rows"], self.columns)
        all_x = [x for x, _ in rows[0]["distance"]] if self.x_heading else []
        lines = [[heading.format(**results) for heading in columns] + [self.x_heading(x) for x in all_x]]
        for row in rows:
            values = dict(row["distance"]) if self.x_heading else {}
            lines.append([cell(row) for cell in columns.values()]
                         + [format_mean_std(values[x]) if x in values else "" for x in all_x])
        return lines


def _merge_curves(scores):
    """Return [[step, distances of the seeds]] at the steps at which all trainings were measured."""
    curves = [score.training.record()["curve"] for score in scores]
    steps = sorted(int(step) for step in set.intersection(*map(set, curves)))
    return [[step, [curve[str(step)] for curve in curves]] for step in steps]
