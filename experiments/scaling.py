"""Figures 6 to 8: depth and width, and patch size: distance over training, and against multiply-adds."""
import itertools
import math
import statistics

from experiments.cli import main
from experiments.statistics import correlation_interval, format_mean_std, mean_std, verdict_of_share
from experiments.study import Study


def rows(preset):
    """All sizes with all patch sizes."""
    networks = [dict(size=size, patch=patch) for size, patch in itertools.product(preset.sizes, preset.patches)]
    return [(network, network, {}) for network in networks]


def correlate(rows, transform=lambda distance: distance):
    """Return the correlation of the distance, or a function of it, and log multiply-adds over the networks."""
    return statistics.correlation([math.log10(row["multiply_adds"]) for row in rows],
                                  [transform(mean_std(row["distance"])[0]) for row in rows])


def make_grid(results):
    """Return the sizes, the patches, and {(size, patch): row}."""
    rows = {(row["size"], row["patch"]): row for row in results["rows"]}
    sizes, patches = (list(dict.fromkeys(names)) for names in zip(*rows))
    return sizes, patches, rows


def columns(results):
    """A row of the table for each size, a column for each patch size."""
    sizes, patches, rows = make_grid(results)

    def cell(patch):
        return lambda size: (f"{rows[size, patch]['multiply_adds'] / 1e6:.2f} M, "
                             f"{format_mean_std(rows[size, patch]['distance'])}")

    return sizes, {"depth x width": str} | {f"patch {patch}: multiply-adds, distance of {{samples}}": cell(patch)
                                            for patch in patches}


def panels(results):
    """Draw the distance over training by size and by patch size, and at its end against multiply-adds."""
    sizes, patches, rows = make_grid(results)
    middle = patches[len(patches) // 2]
    for shown in ([(size, middle) for size in sizes], [(sizes[-1], patch) for patch in patches]):
        yield dict(lines={f"{size}/{patch}": dict(rows[size, patch]["curve"]) for size, patch in shown},
                   xlabel="training steps", samples="curve_samples", log="y", legend="")
    yield dict(lines={f"patch {patch}": {rows[size, patch]["multiply_adds"] / 1e6: rows[size, patch]["distance"]
                                         for size in sizes} for patch in patches},
               xlabel=f"multiply-adds of a forward pass, 10⁶\n({', '.join(sizes)})", log="xy", legend="")


def claims(results):
    """Correlate distance and compute, and compare neighbors in the grid."""
    sizes, patches, rows = make_grid(results)
    if len(rows) > 1:
        correlation = correlate(results["rows"])
        low, high = correlation_interval(correlation, len(rows))
        yield ("more multiply-adds, lower distance: the logarithm of one is correlated with the other", "-0.93",
               f"{correlation:.2f}, with 95% in {low:.2f} .. {high:.2f} ({len(rows)} networks; with log distance "
               f"{correlate(results['rows'], math.log):.2f})", "yes" if high < 0 else "no" if low > 0 else "not clear")
    distance = {key: mean_std(row["distance"])[0] for key, row in rows.items()}
    larger = [distance[b, patch] < distance[a, patch] for a, b in itertools.pairwise(sizes) for patch in patches]
    finer = [distance[size, b] < distance[size, a] for a, b in itertools.pairwise(patches) for size in sizes]
    for claim, paper, comparisons in (
            ("the deeper and wider network ends lower, at every patch size", "9 of 9", larger),
            ("smaller patches end lower, at every depth and width", "8 of 8", finer)):
        if comparisons:
            yield (claim, f"{paper} neighbors in table 4", f"{sum(comparisons)} of {len(comparisons)} neighbors",
                   verdict_of_share(comparisons))


STUDY = Study(name="scaling", title="Distance over training steps, and against multiply-adds", rows=rows,
              columns=columns, panels=panels, claims=claims, metrics=("curve", "distance"), seeds="grid_seeds")

if __name__ == "__main__":
    main(STUDY)
