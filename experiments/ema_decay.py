"""The decay of the weights' moving average, and how long the training is: several averages of the same trainings.

    python -m experiments.averages
"""

import contextlib
import os
import sys
from dataclasses import dataclass

from common.errors import run_command
from evaluation.records import write_record
from experiments.figures import curve, finish, log_axes, new_figure
from experiments.job_types import multiply_adds, parameters
from experiments.jobs import Task, to_json_types
from experiments.many_averages import snapshot, state_of
from experiments.runner import run_study
from experiments.statistics import argmin_mean, cross_validated_best, format_mean_std, verdict_lower, verdict_same_sign

TITLE = "Distance over the decay of the moving average"
RAW = 0.3  # where an average over 1 / (1 - decay) = 1 step is drawn: beside the logarithmic axis


@dataclass(frozen=True)
class AveragedTraining(Task):
    """One training with all averages; its request is that of `many_averages`, saved every so many steps. disk: bytes
    that it keeps.
    """
    folder: str
    name: str
    request: dict
    save_every: int
    cost: float
    disk: int

    @property
    def asked(self):
        return to_json_types(self.request)

    def command(self):
        write_record(self.path + ".request.json", self.request | dict(
            folder=os.path.abspath(self.path), save_every=self.save_every))
        return ["-m", "experiments.many_averages", self.path + ".request.json"]

    def finish(self, seconds):
        write_record(self.path + ".json", dict(asked=self.asked, seconds=seconds))
        with contextlib.suppress(FileNotFoundError):  # it is as large as all averages together, and has served
            os.remove(state_of(self.path))

    def checkpoint(self, after, decay, **sampling):
        return snapshot(os.path.abspath(self.path), after, decay)


def _steps(scale):
    return sorted({max(1, round(share * scale.steps)) for share in scale.snapshots})


def _training(setup, seed):
    scale, (size, patch) = setup.scale, setup.scale.one
    network = setup.network(size, patch)
    request = dict(network=network, data_path=setup.images.name, num_workers=setup.images.num_workers, seed=seed,
                   batch_size=scale.batch_size, lr=scale.lr, decays=scale.decays, snapshots=_steps(scale),
                   fast=scale.fast)
    kept = 4 * parameters(network) * len(scale.decays) * len(_steps(scale))
    return AveragedTraining(setup.folder, f"averages/{size}-{patch}-seed-{seed}", request, scale.curve_every,
                            multiply_adds(network) * scale.steps, kept)


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
        yield f"{row['step']}", *(format_mean_std(values) for _, values in row["distance"])


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
    averaged = {decay: values for decay, values in last.items() if decay}
    best = cross_validated_best(averaged)
    yield ("averaged weights are better than the weights themselves", "0.9999 throughout",
           f"{format_mean_std(best)} with each seed's decay chosen by the others ({argmin_mean(averaged):g} by all), "
           f"{format_mean_std(last[0])} without", verdict_lower(best, last[0]))
    if len(found["rows"]) > 1:
        decays = [[argmin_mean({decay: values[seed:seed + 1] for decay, values in row.items() if decay})
                   for seed in range(len(found["seeds"]))] for row in (first, last)]
        yield ("a longer training wants a longer average", "no comparison",
               " against ".join(", ".join(f"{decay:g}" for decay in own) for own in decays) + " are the seeds' best "
               f"decays after {found['rows'][0]['step']} against {found['rows'][-1]['step']} steps",
               verdict_same_sign([after - before for before, after in zip(*decays)]))


if __name__ == "__main__":
    run_command(lambda: run_study(sys.modules[__name__]))
