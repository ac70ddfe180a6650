"""The decay of the weights' moving average, and how long the training is: several averages of the same trainings.

    python -m experiments.averages
"""
import os
import sys
from dataclasses import dataclass

from evaluation.records import write_record
from runtime.errors import run_command

from .figures import curve, finish, log_axes, new_figure
from .many_averages import snapshot
from .pieces import Piece, plain
from .spread import mean_spread, plus_minus, seen_lower
from .study import run_study
from .trainings import multiply_adds

TITLE = "Distance over the decay of the moving average"
RAW = 0.3  # where an average over 1 / (1 - decay) = 1 step is drawn: beside the logarithmic axis


@dataclass(frozen=True)
class AveragedTraining(Piece):
    """One training with all averages; its request is that of `many_averages`."""
    folder: str
    name: str
    request: dict
    cost: float

    @property
    def asked(self):
        return plain(self.request)

    def command(self):
        write_record(self.path + ".request.json", self.request | dict(folder=os.path.abspath(self.path)))
        return ["-m", "experiments.many_averages", self.path + ".request.json"]

    def finish(self, seconds):
        write_record(self.path + ".json", dict(asked=self.asked, seconds=seconds))

    def checkpoint(self, after, decay, **asked):
        return snapshot(os.path.abspath(self.path), after, decay)


def _steps(scale):
    return sorted({max(1, round(share * scale.steps)) for share in scale.snapshots})


def _training(setup, seed):
    scale, flags = setup.scale, setup.images.flags
    size, patch = scale.one
    request = dict(network=setup.network(size, patch), data_path=flags[flags.index("--data-path") + 1],
                   num_workers=flags[flags.index("--num-workers") + 1], seed=seed, batch_size=scale.batch_size,
                   lr=scale.lr, decays=scale.decays, snapshots=_steps(scale), fast=scale.fast)
    return AveragedTraining(setup.folder, f"averages/{size}-{patch}-seed-{seed}", request,
                            multiply_adds(setup.network(size, patch)) * scale.steps)


def scores(setup):
    """{(step, decay, seed): score}"""
    return {(step, decay, seed): setup.score(_training(setup, seed), seed=seed, after=step, decay=decay)
            for step in _steps(setup.scale) for decay in setup.scale.decays for seed in setup.scale.seeds}


def results(setup, scores):
    scale = setup.scale
    rows = [dict(step=step, distance=[[decay, [scores[step, decay, seed].found() for seed in scale.seeds]]
                                     for decay in scale.decays]) for step in _steps(scale)]
    size, patch = scale.one
    return dict(seeds=scale.seeds, network=f"{size}/{patch}", rows=rows, **setup.judged(scores))


def table(found):
    yield "steps", *(f"decay {decay:g}" if decay else "no average" for decay, _ in found["rows"][0]["distance"])
    for row in found["rows"]:
        yield f"{row['step']}", *(plus_minus(values) for _, values in row["distance"])


def draw(found, path):
    figure, (axis,) = new_figure(1, width=5.0, height=3.6)
    for number, row in enumerate(found["rows"]):
        curve(axis, {1 / (1 - decay) if decay else RAW: values for decay, values in row["distance"]},
              f"{row['step']} steps", number)
    decays = [decay for decay, _ in found["rows"][0]["distance"]]
    log_axes(axis, "xy")
    axis.set(xlabel="decay of the average (placed at 1 / (1 - decay) steps)",
             ylabel=f"Frechet distance ({found['features']}, {found['samples']} samples)")
    axis.set_xticks([1 / (1 - decay) if decay else RAW for decay in decays],
                    [f"{decay:g}" if decay else "none" for decay in decays])
    axis.minorticks_off()
    finish(figure, axis, path, f"{found['network']}, {len(found['seeds'])} seeds, after")


def claims(found):
    first, last = dict(map(tuple, found["rows"][0]["distance"])), dict(map(tuple, found["rows"][-1]["distance"]))
    best = {name: min((decay for decay in row if decay), key=lambda decay: mean_spread(row[decay])[0])
            for name, row in (("first", first), ("last", last))}
    yield ("averaged weights are better than the weights themselves", "0.9999 throughout; no other is shown",
           f"{plus_minus(last[best['last']])} with {best['last']:g}, {plus_minus(last[0])} without",
           seen_lower(last[best["last"]], last[0]))
    if len(found["rows"]) > 1:
        yield ("a longer training wants a longer average", "no comparison",
               f"best decay {best['first']:g} after {found['rows'][0]['step']} steps, {best['last']:g} after "
               f"{found['rows'][-1]['step']}",
               "yes" if best["last"] > best["first"] else "no" if best["last"] < best["first"] else "not clear")


if __name__ == "__main__":
    run_command(lambda: run_study(sys.modules[__name__]))
