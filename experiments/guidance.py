"""Guidance: its scale against distance and class agreement; some channels or all; an interval of timesteps.

The networks are those of `block_types` with adaLN-Zero. Images with one channel leave no choice of channels.
"""
from common.errors import run_command
from evaluation.plots import new_figure
from experiments.figures import add_legend, distance_label, draw_lines
from experiments.runner import run_study
from experiments.statistics import argmin_mean, cross_validated_best, format_mean_std, mean_std, verdict_lower
from experiments.study import Study


def rows(preset, data):
    """All guidance scales: everywhere, for all channels but one, in intervals of timesteps."""
    settings = [("all timesteps", scale, {}) for scale in preset.guidance_scales]
    if data.channels > 1:
        settings += [(f"{data.channels - 1} of {data.channels} channels", scale, dict(cfg_channels=data.channels - 1))
                     for scale in preset.guidance_scales]
    settings += [(f"timesteps {low} to {high}", scale, dict(cfg_interval=(low, high)))
                 for low, high in preset.intervals for scale in preset.interval_scales]
    return [(dict(guided=title, scale=scale), {}, dict(cfg_scale=float(scale)) | options if scale > 1 else {})
            for title, scale, options in settings]


COLUMNS = {
    "guided": lambda row: row["guided"],
    "scale": lambda row: f"{row['scale']:g}",
    "distance ({samples} samples)": lambda row: format_mean_std(row["distance"]),
    "agreement with the class": lambda row: f"{mean_std(row['agreement'])[0]:.1%}",
    "precision": lambda row: format_mean_std(row["precision"]),
    "recall": lambda row: format_mean_std(row["recall"])}


def draw(results):
    """Draw distance, class agreement, and precision against recall, a line for each kind of guidance."""
    figure, axes = new_figure(3, width=4.0, height=3.6)
    distance, agreement, recall = {}, {}, {}
    for row in results["rows"]:
        distance.setdefault(row["guided"], {})[row["scale"]] = row["distance"]
        agreement.setdefault(row["guided"], {})[row["scale"]] = [100 * value for value in row["agreement"]]
        recall.setdefault(row["guided"], {})[mean_std(row["recall"])[0]] = row["precision"]
    draw_lines(axes[0], distance, "guidance scale", distance_label(results), "y")
    draw_lines(axes[1], agreement, "guidance scale", "taken for their class by the classifier, %")
    draw_lines(axes[2], recall, "recall", "precision")
    add_legend(axes[0], f"{results['network']}, {len(results['seeds'])} seeds")
    return figure


def claims(results):
    """Compare with and without guidance, and intervals with all timesteps."""
    rows = {(row["guided"], row["scale"]): row for row in results["rows"]}
    plain = {scale: row for (title, scale), row in rows.items() if title == "all timesteps"}
    strongest = max(plain)
    none, most = plain[1], plain[strongest]
    guided = {scale: row["distance"] for scale, row in plain.items() if scale > 1}
    best, distance = argmin_mean(guided), cross_validated_best(guided)
    yield ("guidance lowers the distance", "9.62 without, 3.22 at 1.25, 2.27 at 1.5 (FID-50K, XL/2 after 7M steps)",
           f"{format_mean_std(none['distance'])} without, {format_mean_std(distance)} with each seed's scale chosen by "
           f"the others ({best:g} by all)", verdict_lower(distance, none["distance"]))
    rises = best < strongest
    yield ("too much of it raises the distance again", "scales near 1.5 are used for FID, 4 for pictures",
           f"{format_mean_std(most['distance'])} at {strongest:g}" if rises else f"no rise seen up to {strongest:g}",
           verdict_lower(distance, most["distance"]) if rises else "not clear")
    agreement = [mean_std(row["agreement"])[0] for row in (none, most)]
    yield ("more samples show the class that was asked for", "why guidance is there; no number of this kind",
           f"{agreement[0]:.1%} without, {agreement[1]:.1%} at {strongest:g}",
           verdict_lower(none["agreement"], most["agreement"]))
    if within := {key: row["distance"] for key, row in rows.items() if key[0].startswith("timesteps")}:
        (title, scale), chosen = argmin_mean(within), cross_validated_best(within)
        yield ("guidance in an interval of timesteps ends lower than in all", "later work (Kynkaanniemi et al., 2024)",
               f"{format_mean_std(chosen)} with each seed's interval and scale chosen by the others ({title} at "
               f"{scale:g} by all), {format_mean_std(distance)} in all", verdict_lower(chosen, distance))


STUDY = Study("guidance", "Distance and class agreement over the guidance scale", rows, COLUMNS, draw, claims,
              metrics=("distance", "agreement", "precision", "recall"),
              sampled="Samples guided as the table says, by {}")

if __name__ == "__main__":
    run_command(lambda: run_study(STUDY))
