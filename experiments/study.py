"""A study: which networks it scores, and how its results are stored, shown as a table, drawn and judged."""
from collections.abc import Callable
from dataclasses import dataclass

from experiments.job_types import merge_curves
from experiments.statistics import format_mean_std


@dataclass(frozen=True)
class Study:
    """A study of the paper, declared by a module of this package.

    Attributes:
        name (str): Name of its module.
        title (str): Title of its picture.
        rows (Callable): (context) -> iterable of (fields, scores). The fields describe a row of the results; the scores
            are one of each seed, or {x: scores of the seeds} if the row is a function of x.
        table (Callable): (results) -> rows of strings, headings first.
        draw (Callable): (results) -> matplotlib figure.
        claims (Callable): (results) -> iterable of (claim, the paper, here, verdict).
        metrics (tuple[str]): What is stored of a row's scores; "curve" stands for the distance over training.
        sampled (str): How samples are made; {} stands for the preset's sampler.
        seeds (str): Field of the preset with the seeds.
        summarize (Callable): (rows of the results) -> further fields of the results.
    """

    name: str
    title: str
    rows: Callable
    table: Callable
    draw: Callable
    claims: Callable
    metrics: tuple = ("distance",)
    sampled: str = "Samples without guidance, by {}"
    seeds: str = "seeds"
    summarize: Callable = lambda rows: {}

    def list_scores(self, context):
        """Return all scores of the study; its trainings follow from them."""
        by_row = (scores.values() if isinstance(scores, dict) else [scores] for _, scores in self.rows(context))
        return [score for groups in by_row for group in groups for score in group]

    def collect_results(self, context):
        """Return the results as plain values, once all scores are done."""
        rows = [fields | self._measured(scores) for fields, scores in self.rows(context)]
        network = {} if self.seeds == "grid_seeds" else dict(network="{}/{}".format(*context.preset.network))
        return (dict(seeds=getattr(context.preset, self.seeds), rows=rows) | network | self.summarize(rows)
                | context.metadata(self.list_scores(context)))

    def _measured(self, scores):
        if isinstance(scores, dict):
            return dict(distance=[[x, [score.value() for score in group]] for x, group in scores.items()])
        return {metric: merge_curves(scores) if metric == "curve" else [score.value(metric) for score in scores]
                for metric in self.metrics}


def make_table(rows, columns, x_heading=None):
    """Return rows of strings.

    Args:
        rows (list): Rows of the results, or whatever the columns' functions take.
        columns (dict): {heading: function of a row}.
        x_heading (callable): x -> heading of another column, with the distances of rows that are functions of x.
    """
    counts = [x for x, _ in rows[0]["distance"]] if x_heading else []
    lines = [[*columns, *map(x_heading, counts)]] if x_heading else [list(columns)]
    for row in rows:
        values = dict(map(tuple, row["distance"])) if x_heading else {}
        lines.append([*(cell(row) for cell in columns.values()),
                      *(format_mean_std(values[x]) if x in values else "" for x in counts)])
    return lines
