"""Figure 5: the block types with the same size, data, steps and seeds."""
from common.errors import run_command
from evaluation.plots import new_figure
from experiments.figures import add_legend, distance_label, draw_lines
from experiments.runner import run_study
from experiments.statistics import format_mean_std, mean_std, verdict_lower
from experiments.study import Study

# Table 4 of the paper: FID-50K of DiT-XL/2 after 400K steps without guidance. PixArt-alpha added the last type.
PAPER = {"in-context": 35.24, "cross-attention": 26.14, "adaln": 25.21, "adaln-zero": 19.47, "adaln-single": None}


def rows(preset, data):
    """Each block type in the preset's network."""
    return [(dict(type=name), dict(conditioning=name), {}) for name in PAPER]


COLUMNS = {
    "block": lambda row: row["type"],
    "parameters": lambda row: f"{row['parameters']:,}",
    "multiply-adds": lambda row: f"{row['multiply_adds'] / 1e6:.3f} M",
    "distance ({samples} samples)": lambda row: format_mean_std(row["distance"]),
    "agreement with the class": lambda row: f"{mean_std(row['agreement'])[0]:.1%}",
    "the paper: DiT-XL/2, FID-50K": lambda row: f"{PAPER[row['type']] or '(PixArt-alpha)'}"}


def draw(results):
    """Draw the distance over training, a line for each block type."""
    figure, (axis,) = new_figure(1, width=5.5, height=3.6)
    ylabel = f"{distance_label(results, 'curve_samples')[:-1]}, {len(results['seeds'])} seeds ± 1 s.d.)"
    draw_lines(axis, {row["type"]: dict(row["curve"]) for row in results["rows"]}, "training steps",
               ylabel.replace(", ", ",\n", 1), "y")
    add_legend(axis, f"DiT {results['network']}, {results['data']}")
    return figure


def claims(results):
    """Compare adaLN-Zero with the paper's other types."""
    distance = {row["type"]: row["distance"] for row in results["rows"]}
    for other in ("adaln", "cross-attention", "in-context"):
        yield (f"adaLN-Zero ends lower than {other}", f"FID {PAPER['adaln-zero']} against {PAPER[other]}",
               f"{format_mean_std(distance['adaln-zero'])} against {format_mean_std(distance[other])}",
               verdict_lower(distance["adaln-zero"], distance[other]))


STUDY = Study("block_types", "Distance over training steps, by block type", rows, COLUMNS, draw, claims,
              metrics=("curve", "distance", "agreement"))

if __name__ == "__main__":
    run_command(lambda: run_study(STUDY))
