"""Guidance: its scale against distance and class agreement; some channels or all; an interval of timesteps.

The networks are those of `block_types` with adaLN-Zero. Images with one channel leave no choice of channels.
"""
from experiments.cli import main
from experiments.statistics import (
    argmin_mean,
    cross_validated_best,
    format_mean_std,
    format_percent,
    mean_std,
    verdict_lower,
)
from experiments.study import Study


def rows(preset):
    """All guidance scales: everywhere, for all channels but one, in intervals of timesteps."""
    settings = [("all timesteps", preset.guidance_scales, {})]
    if preset.channels > 1:
        guided = preset.channels - 1
        settings.append((f"{guided} of {preset.channels} channels", preset.guidance_scales, dict(cfg_channels=guided)))
    settings += [(f"timesteps {low} to {high}", preset.interval_scales, dict(cfg_interval=(low, high)))
                 for low, high in preset.intervals]
    return [(dict(guided=title, scale=scale), {}, dict(cfg_scale=float(scale)) | options if scale > 1 else {})
            for title, scales, options in settings for scale in scales]


def panels(results):
    """Draw distance, class agreement, and precision against recall, a line for each kind of guidance."""
    distance, agreement, recall = {}, {}, {}
    for row in results["rows"]:
        distance.setdefault(row["guided"], {})[row["scale"]] = row["distance"]
        agreement.setdefault(row["guided"], {})[row["scale"]] = [100 * value for value in row["agreement"]]
        recall.setdefault(row["guided"], {})[mean_std(row["recall"])[0]] = row["precision"]
    return [dict(lines=distance, xlabel="guidance scale", log="y",
                 legend=f"{results['network']}, {len(results['seeds'])} seeds"),
            dict(lines=agreement, xlabel="guidance scale", ylabel="taken for their class by the classifier, %"),
            dict(lines=recall, xlabel="recall", ylabel="precision")]


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
    yield ("more samples show the class that was asked for", "why guidance is there; no number of this kind",
           f"{format_percent(none['agreement'])} without, {format_percent(most['agreement'])} at {strongest:g}",
           verdict_lower(none["agreement"], most["agreement"]))
    if within := {key: row["distance"] for key, row in rows.items() if key[0].startswith("timesteps")}:
        (title, scale), chosen = argmin_mean(within), cross_validated_best(within)
        yield ("guidance in an interval of timesteps ends lower than in all", "later work (Kynkaanniemi et al., 2024)",
               f"{format_mean_std(chosen)} with each seed's interval and scale chosen by the others ({title} at "
               f"{scale:g} by all), {format_mean_std(distance)} in all", verdict_lower(chosen, distance))


STUDY = Study(
    name="guidance", title="Distance and class agreement over the guidance scale", rows=rows, panels=panels,
    claims=claims,
    columns={"guided": lambda row: row["guided"],
             "scale": lambda row: f"{row['scale']:g}",
             "distance ({samples} samples)": lambda row: format_mean_std(row["distance"]),
             "agreement with the class": lambda row: format_percent(row["agreement"]),
             "precision": lambda row: format_mean_std(row["precision"]),
             "recall": lambda row: format_mean_std(row["recall"])},
    metrics=("distance", "agreement", "precision", "recall"), sampled="Samples guided as the table says, by {}")

if __name__ == "__main__":
    main(STUDY)
