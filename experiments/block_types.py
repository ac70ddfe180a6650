"""Figure 5: the block types with the same size, data, steps and seeds.

    python -m experiments.block_types
"""
from common.errors import run_command
from experiments.figures import add_legend, distance_label, draw_lines, new_figure
from experiments.job_types import network_cost
from experiments.runner import run_study
from experiments.statistics import format_mean_std, mean_std, verdict_lower
from experiments.study import Study, make_table

# Table 4 of the paper: FID-50K of DiT-XL/2 after 400K steps without guidance. PixArt-alpha added the last type.
PAPER = {"in-context": 35.24, "cross-attention": 26.14, "adaln": 25.21, "adaln-zero": 19.47, "adaln-single": None}


def rows(context):
    for name in PAPER:
        trainings = {seed: context.training(*context.preset.network, seed, name) for seed in context.preset.seeds}
        network = context.network(*context.preset.network) | dict(conditioning=name)
        yield (dict(type=name) | network_cost(network),
               [context.score(training, seed=seed) for seed, training in trainings.items()])


def table(results):
    return make_table(results["rows"], {
        "block": lambda row: row["type"],
        "parameters": lambda row: f"{row['parameters']:,}",
        "multiply-adds": lambda row: f"{row['multiply_adds'] / 1e6:.3f} M",
        f"distance ({results['samples']} samples)": lambda row: format_mean_std(row["distance"]),
        "agreement with the class": lambda row: f"{mean_std(row['agreement'])[0]:.1%}",
        "the paper: DiT-XL/2, FID-50K": lambda row: f"{PAPER[row['type']] or '(PixArt-alpha)'}"})


def draw(results):
    figure, (axis,) = new_figure(1, width=5.5, height=3.6)
    ylabel = f"{distance_label(results, 'curve_samples')[:-1]}, {len(results['seeds'])} seeds ± 1 s.d.)"
    draw_lines(axis, {row["type"]: dict(row["curve"]) for row in results["rows"]}, "training steps",
               ylabel.replace(", ", ",\n", 1), "y")
    add_legend(axis, f"DiT {results['network']}, {results['data']}")
    return figure


def claims(results):
    distance = {row["type"]: row["distance"] for row in results["rows"]}
    for other in ("adaln", "cross-attention", "in-context"):
        yield (f"adaLN-Zero ends lower than {other}", f"FID {PAPER['adaln-zero']} against {PAPER[other]}",
               f"{format_mean_std(distance['adaln-zero'])} against {format_mean_std(distance[other])}",
               verdict_lower(distance["adaln-zero"], distance[other]))


STUDY = Study("block_types", "Distance over training steps, by block type", rows, table, draw, claims,
              metrics=("curve", "distance", "agreement"))

if __name__ == "__main__":
    run_command(lambda: run_study(STUDY))
