"""Learned against fixed variances in few steps: the reason why the network learns its variance (Improved DDPM).

    python -m experiments.variance

The same networks throughout, those of `block_types` with adaLN-Zero: only the noise that a sampling step adds differs.
DDIM, which adds none, beside them.
"""

import sys

from common.errors import run_command
from experiments.figures import curve, finish, log_axes, new_figure
from experiments.runner import run_study
from experiments.statistics import format_mean_std, mean_std, verdict_lower, verdict_of_all

TITLE = "Distance over sampling steps, by the variance of a step"
SAMPLED = "Samples without guidance, by DDPM with these variances, or DDIM, in the steps of the table"
NAMES = {"learned": "learned", "fixed_small": "fixed, posterior's (small)", "fixed_large": "fixed, beta (large)",
         "ddim": "DDIM"}
FEW = 25  # sampling steps


def scores(setup):
    """{(variance, steps, seed): score}"""
    return {(name, steps, seed): setup.score(setup.training(*setup.scale.one, seed), seed=seed, **(
        dict(steps=f"ddim{steps}") if name == "ddim" else dict(steps=steps, variance=name)))
        for name in NAMES for steps in setup.scale.variance_steps for seed in setup.scale.seeds
        if name != "ddim" or 1000 % steps == 0}  # DDIM takes steps at one distance


def results(setup, scores):
    seeds, distances = setup.scale.seeds, {}
    for (name, steps, _), score in scores.items():
        distances.setdefault(name, {}).setdefault(steps, []).append(score.found())
    rows = [dict(variance=name, distance=[[steps, values] for steps, values in own.items()])
            for name, own in distances.items()]
    size, patch = setup.scale.one
    return dict(seeds=seeds, network=f"{size}/{patch}", rows=rows, **setup.judged(scores))


def table(found):
    counts = [steps for steps, _ in found["rows"][0]["distance"]]
    yield "variance", *(f"{steps} steps" for steps in counts)
    for row in found["rows"]:
        values = dict(map(tuple, row["distance"]))
        yield NAMES[row["variance"]], *(format_mean_std(values[steps]) if steps in values else "" for steps in counts)


def draw(found, path):
    figure, (axis,) = new_figure(1, width=5.0, height=3.6)
    for number, row in enumerate(found["rows"]):
        curve(axis, dict(map(tuple, row["distance"])), NAMES[row["variance"]], number)
    log_axes(axis, "xy")
    axis.set(xlabel="sampling steps",
             ylabel=f"Frechet distance ({found['features']}, {found['samples']} samples)")
    counts = [steps for steps, _ in found["rows"][0]["distance"]]
    axis.set_xticks(counts, [str(steps) for steps in counts])
    axis.minorticks_off()
    finish(figure, axis, path, f"{found['network']}, {len(found['seeds'])} seeds")


def claims(found):
    distance = {row["variance"]: dict(map(tuple, row["distance"])) for row in found["rows"]}
    few = [steps for steps in distance["learned"] if steps <= FEW]
    for name in ("fixed_large", "fixed_small"):
        numbers = "; ".join(f"{mean_std(distance['learned'][steps])[0]:.2f} against "
                            f"{mean_std(distance[name][steps])[0]:.2f} in {steps}" for steps in few)
        yield (f"in few steps the learned variance is better than the {NAMES[name]} one",
               "no comparison; as we remember Improved DDPM: so", numbers,
               verdict_of_all(verdict_lower(distance["learned"][steps], distance[name][steps]) for steps in few))


if __name__ == "__main__":
    run_command(lambda: run_study(sys.modules[__name__]))
