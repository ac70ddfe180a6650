"""Figure 5: the block types with the same size, data, steps and seeds."""
from experiments.cli import main
from experiments.statistics import format_mean_std, format_percent, verdict_lower
from experiments.study import Study

# Table 4 of the paper: FID-50K of DiT-XL/2 after 400K steps without guidance. PixArt-alpha added the last type.
PAPER = {"in-context": 35.24, "cross-attention": 26.14, "adaln": 25.21, "adaln-zero": 19.47, "adaln-single": None}


def panels(results):
    """Draw the distance over training, a line for each block type."""
    yield dict(lines={row["type"]: dict(row["curve"]) for row in results["rows"]}, xlabel="training steps",
               samples="curve_samples", log="y",
               legend=f"DiT {results['network']}, {results['data']},\n{len(results['seeds'])} seeds ± 1 s.d.")


def claims(results):
    """Compare adaLN-Zero with the paper's other types."""
    distance = {row["type"]: row["distance"] for row in results["rows"]}
    for other in ("adaln", "cross-attention", "in-context"):
        yield (f"adaLN-Zero ends lower than {other}", f"FID {PAPER['adaln-zero']} against {PAPER[other]}",
               f"{format_mean_std(distance['adaln-zero'])} against {format_mean_std(distance[other])}",
               verdict_lower(distance["adaln-zero"], distance[other]))


STUDY = Study(
    name="block_types", title="Distance over training steps, by block type", panels=panels, claims=claims,
    rows=lambda preset: [(dict(type=name), dict(conditioning=name), {}) for name in PAPER],
    columns={"block": lambda row: row["type"],
             "parameters": lambda row: f"{row['parameters']:,}",
             "multiply-adds": lambda row: f"{row['multiply_adds'] / 1e6:.3f} M",
             "distance ({samples} samples)": lambda row: format_mean_std(row["distance"]),
             "agreement with the class": lambda row: format_percent(row["agreement"]),
             "the paper: DiT-XL/2, FID-50K": lambda row: f"{PAPER[row['type']] or '(PixArt-alpha)'}"},
    metrics=("curve", "distance", "agreement"))

if __name__ == "__main__":
    main(STUDY)
