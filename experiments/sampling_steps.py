"""Figure 10: compute of sampling does not make up for compute of the network. The networks are those of `scaling`.

    python -m experiments.sampling_steps
"""

import itertools
import sys

from common.errors import run_command
from experiments.figures import curve, finish, log_axes, new_figure
from experiments.job_types import multiply_adds
from experiments.runner import run_study
from experiments.statistics import format_mean_std, mean_std, verdict_of_share

TITLE = "Distance against the compute of sampling"
SAMPLED = "Samples without guidance, by DDPM in the steps of the table"


def scores(setup):
    """{(size, patch, steps, seed): score}"""
    scale = setup.scale
    return {(size, patch, steps, seed): setup.score(setup.training(size, patch, seed), samples=scale.step_samples,
                                                    steps=steps, seed=seed)
            for size, patch, steps, seed in itertools.product(scale.sizes, scale.step_patches, scale.step_counts,
                                                              scale.grid_seeds)}


def results(setup, scores):
    scale, rows = setup.scale, []
    for size, patch in itertools.product(scale.sizes, scale.step_patches):
        rows.append(dict(size=size, patch=patch, multiply_adds=multiply_adds(setup.network(size, patch)), distance=[
            [steps, [scores[size, patch, steps, seed].found() for seed in scale.grid_seeds]]
            for steps in scale.step_counts]))
    return dict(seeds=scale.grid_seeds, rows=rows, **setup.judged(scores))


def table(found):
    counts = [steps for steps, _ in found["rows"][0]["distance"]]
    yield ("network", "multiply-adds", *(f"{steps} steps" for steps in counts))
    for row in found["rows"]:
        yield (f"{row['size']}/{row['patch']}", f"{row['multiply_adds'] / 1e6:.2f} M",
               *(format_mean_std(values) for _, values in row["distance"]))


def draw(found, path):
    patches = list(dict.fromkeys(row["patch"] for row in found["rows"]))
    figure, axes = new_figure(len(patches), width=4.4, height=3.6)
    for axis, patch in zip(axes, patches):
        for number, row in enumerate(row for row in found["rows"] if row["patch"] == patch):
            points = {steps * row["multiply_adds"] / 1e9: values for steps, values in row["distance"]}
            curve(axis, points, f"{row['size']}/{row['patch']}", number)
        counts = ", ".join(str(steps) for steps, _ in found["rows"][0]["distance"])
        log_axes(axis, "xy")
        axis.set(xlabel=f"multiply-adds of sampling an image, 10⁹\n({counts} steps)",
                 ylabel=f"Frechet distance ({found['features']}, {found['samples']} samples)")
        axis.legend(frameon=False, fontsize="small")
    finish(figure, axes[-1], path)


def claims(found):
    wins = []
    for small, large in itertools.permutations(found["rows"], 2):
        if small["patch"] != large["patch"] or small["multiply_adds"] >= large["multiply_adds"]:
            continue
        most, distance = small["distance"][-1]
        cheaper = [values for steps, values in large["distance"]
                   if steps * large["multiply_adds"] <= most * small["multiply_adds"]]
        if cheaper:
            wins.append(mean_std(cheaper[-1])[0] < mean_std(distance)[0])
    if wins:
        yield ("a smaller network with most steps stays behind a larger one with no more compute for an image",
               "as we remember it: L/2 with 1000 steps (80.7 Tflops) 25.9, XL/2 with 128 (15.2 Tflops) 23.7",
               f"so in {sum(wins)} of {len(wins)} pairs of the same patch size", verdict_of_share(wins))


if __name__ == "__main__":
    run_command(lambda: run_study(sys.modules[__name__]))
