"""Figures 6 to 8: depth and width, and patch size: distance over training, and against multiply-adds."""
import itertools
import math
import statistics

from common.errors import run_command
from evaluation.plots import new_figure
from experiments.figures import COLORS, MARKERS, add_legend, distance_label, draw_lines, set_log_axes
from experiments.runner import run_study
from experiments.statistics import correlation_interval, format_mean_std, mean_std, verdict_of_share
from experiments.study import Study


def rows(preset, data):
    """All sizes with all patch sizes."""
    networks = [dict(size=size, patch=patch) for size, patch in itertools.product(preset.sizes, preset.patches)]
    return [(network, network, {}) for network in networks]


def summarize(rows):
    """Return the correlation of distance and log multiply-adds over the networks."""
    if len(rows) < 2:
        return {}
    x, y = [math.log10(row["multiply_adds"]) for row in rows], [mean_std(row["distance"])[0] for row in rows]
    r = statistics.correlation(x, y)
    return dict(correlation=r, interval=correlation_interval(r, len(rows)),
                correlation_with_log_distance=statistics.correlation(x, [math.log(value) for value in y]))


def _grid(results):
    """Return the sizes, the patches, and {(size, patch): row}."""
    rows = {(row["size"], row["patch"]): row for row in results["rows"]}
    sizes, patches = (list(dict.fromkeys(names)) for names in zip(*rows))
    return sizes, patches, rows


def columns(results):
    """A row of the table for each size, a column for each patch size."""
    sizes, patches, rows = _grid(results)

    def cell(patch):
        return lambda size: (f"{rows[size, patch]['multiply_adds'] / 1e6:.2f} M, "
                             f"{format_mean_std(rows[size, patch]['distance'])}")

    return sizes, {"depth x width": str} | {f"patch {patch}: multiply-adds, distance of {{samples}}": cell(patch)
                                            for patch in patches}


def draw(results):
    """Draw the distance over training by size and by patch size, and at its end against multiply-adds."""
    figure, axes = new_figure(3, width=4.0, height=3.6)
    sizes, patches, rows = _grid(results)
    middle = patches[len(patches) // 2]
    panels = [(size, middle) for size in sizes], [(sizes[-1], patch) for patch in patches]
    for axis, shown in zip(axes, panels):
        draw_lines(axis, {f"{size}/{patch}": dict(rows[size, patch]["curve"]) for size, patch in shown},
                   "training steps", distance_label(results, "curve_samples"), "y")
        add_legend(axis)
    for (size, patch), row in rows.items():
        i, (mean, std) = sizes.index(size), mean_std(row["distance"])
        axes[2].errorbar(row["multiply_adds"] / 1e6, mean, yerr=std, color=COLORS[i], marker=MARKERS[i],
                         linestyle="none", capsize=2, elinewidth=0.8, markersize=6,
                         markerfacecolor=(COLORS[i], "white", "0.75")[patches.index(patch) % 3])
    set_log_axes(axes[2], "xy")
    title = f"correlation with log multiply-adds: {results['correlation']:.2f}" if "correlation" in results else ""
    axes[2].set(xlabel="multiply-adds of a forward pass, 10⁶",
                ylabel=f"Frechet distance at the end ({results['samples']} samples)", title=title)
    axes[2].title.set_fontsize("small")
    for i, size in enumerate(sizes):
        axes[2].plot([], [], color=COLORS[i], marker=MARKERS[i], linestyle="none", label=size)
    for i, patch in enumerate(patches):
        axes[2].plot([], [], color="black", marker="o", linestyle="none", label=f"patch {patch}",
                     markerfacecolor=("black", "white", "0.75")[i % 3])
    add_legend(axes[2])
    return figure


def claims(results):
    """Correlate distance and compute, and compare neighbors in the grid."""
    if "correlation" in results:
        low, high = results["interval"]
        yield ("more multiply-adds, lower distance: the logarithm of one is correlated with the other", "-0.93",
               f"{results['correlation']:.2f}, with 95% in {low:.2f} .. {high:.2f} ({len(results['rows'])} networks; "
               f"with log distance {results['correlation_with_log_distance']:.2f})",
               "yes" if high < 0 else "no" if low > 0 else "not clear")
    sizes, patches, rows = _grid(results)
    distance = {key: mean_std(row["distance"])[0] for key, row in rows.items()}
    larger = [distance[b, patch] < distance[a, patch] for a, b in itertools.pairwise(sizes) for patch in patches]
    finer = [distance[size, b] < distance[size, a] for a, b in itertools.pairwise(patches) for size in sizes]
    for claim, paper, comparisons in (
            ("the deeper and wider network ends lower, at every patch size", "9 of 9", larger),
            ("smaller patches end lower, at every depth and width", "8 of 8", finer)):
        if comparisons:
            yield (claim, f"{paper} neighbours in table 4", f"{sum(comparisons)} of {len(comparisons)} neighbours",
                   verdict_of_share(comparisons))


STUDY = Study("scaling", "Distance over training steps, and against multiply-adds", rows, columns, draw, claims,
              metrics=("curve", "distance"), seeds="grid_seeds", summarize=summarize)

if __name__ == "__main__":
    run_command(lambda: run_study(STUDY))
