"""Figures 6 to 8: depth and width, and patch size: distance over the training's steps, and against multiply-adds.

    python -m experiments.scaling
"""

import itertools
import math
import sys

from common.errors import run_command
from experiments.figures import COLORS, MARKERS, curve, finish, log_axes, new_figure
from experiments.job_types import curve_of, multiply_adds
from experiments.runner import run_study
from experiments.statistics import correlation, correlation_interval, format_mean_std, mean_std, verdict_of_share

TITLE = "Distance over training steps, and against multiply-adds"
PAPER_CORRELATION = -0.93


def scores(setup):
    """{(size, patch, seed): score}"""
    scale = setup.scale
    return {(size, patch, seed): setup.score(setup.training(size, patch, seed), seed=seed)
            for size, patch, seed in itertools.product(scale.sizes, scale.patches, scale.grid_seeds)}


def results(setup, scores):
    rows = []
    for size, patch in itertools.product(setup.scale.sizes, setup.scale.patches):
        own = [scores[size, patch, seed] for seed in setup.scale.grid_seeds]
        rows.append(dict(size=size, patch=patch, multiply_adds=multiply_adds(setup.network(size, patch)),
                         curve=curve_of(own), distance=[score.found() for score in own]))
    x, y = [math.log10(row["multiply_adds"]) for row in rows], [mean_std(row["distance"])[0] for row in rows]
    r = correlation(x, y)
    return dict(seeds=setup.scale.grid_seeds, rows=rows, correlation=r, correlation_with_log_distance=correlation(
        x, [math.log(value) for value in y]), interval=correlation_interval(r, len(rows)), **setup.judged(scores))


def table(found):
    sizes, patches = (list(dict.fromkeys(row[name] for row in found["rows"])) for name in ("size", "patch"))
    rows = {(row["size"], row["patch"]): row for row in found["rows"]}
    yield ("depth x width", *(f"patch {patch}: multiply-adds, distance of {found['samples']}" for patch in patches))
    for size in sizes:
        yield (size, *(f"{rows[size, patch]['multiply_adds'] / 1e6:.2f} M, {format_mean_std(rows[size, patch]['distance'])}"
                       for patch in patches))


def draw(found, path):
    figure, axes = new_figure(3, width=4.0, height=3.6)
    sizes, patches = (list(dict.fromkeys(row[name] for row in found["rows"])) for name in ("size", "patch"))
    middle = patches[len(patches) // 2]
    for row in found["rows"]:
        number, dash = sizes.index(row["size"]), patches.index(row["patch"])
        if row["patch"] == middle:
            curve(axes[0], dict(row["curve"]), f"{row['size']}/{row['patch']}", number)
        if row["size"] == sizes[-1]:
            curve(axes[1], dict(row["curve"]), f"{row['size']}/{row['patch']}", dash)
        mean, spread = mean_std(row["distance"])
        axes[2].errorbar(row["multiply_adds"] / 1e6, mean, yerr=spread, color=COLORS[number], marker=MARKERS[number],
                         linestyle="none", capsize=2, elinewidth=0.8, markersize=6, markerfacecolor=(
                             COLORS[number], "white", "0.75")[dash % 3])
    for axis in axes[:2]:
        log_axes(axis)
        axis.set(xlabel="training steps",
                 ylabel=f"Frechet distance ({found['features']}, {found['curve_samples']} samples)")
        axis.legend(frameon=False, fontsize="small")
    log_axes(axes[2], "xy")
    axes[2].set(xlabel="multiply-adds of a forward pass, 10⁶",
                ylabel=f"Frechet distance at the end ({found['samples']} samples)",
                title=f"correlation with log multiply-adds: {found['correlation']:.2f}")
    axes[2].title.set_fontsize("small")
    for number, size in enumerate(sizes):
        axes[2].plot([], [], color=COLORS[number], marker=MARKERS[number], linestyle="none", label=size)
    for dash, patch in enumerate(patches):
        axes[2].plot([], [], color="black", marker="o", linestyle="none", label=f"patch {patch}",
                     markerfacecolor=("black", "white", "0.75")[dash % 3])
    finish(figure, axes[2], path)


def claims(found):
    low, high = found["interval"]
    yield ("more multiply-adds, lower distance: the logarithm of one is correlated with the other",
           f"{PAPER_CORRELATION}", f"{found['correlation']:.2f}, with 95% in {low:.2f} .. {high:.2f} "
           f"({len(found['rows'])} networks; with log distance {found['correlation_with_log_distance']:.2f})",
           "yes" if high < 0 else "no" if low > 0 else "not clear")
    distance = {(row["size"], row["patch"]): mean_std(row["distance"])[0] for row in found["rows"]}
    sizes, patches = (list(dict.fromkeys(row[name] for row in found["rows"])) for name in ("size", "patch"))
    larger = [distance[b, patch] < distance[a, patch] for a, b in itertools.pairwise(sizes) for patch in patches]
    finer = [distance[size, b] < distance[size, a] for a, b in itertools.pairwise(patches) for size in sizes]
    for claim, paper, comparisons in (
            ("the deeper and wider network ends lower, at every patch size", "9 of 9", larger),
            ("smaller patches end lower, at every depth and width", "8 of 8", finer)):
        if comparisons:
            yield (claim, f"{paper} neighbours in table 4", f"{sum(comparisons)} of {len(comparisons)} neighbours",
                   verdict_of_share(comparisons))


if __name__ == "__main__":
    run_command(lambda: run_study(sys.modules[__name__]))
