"""Guidance: its scale against distance and class agreement; some channels against all; an interval of timesteps alone.

    python -m experiments.guidance

The network is that of `block_types` with adaLN-Zero. Where images have one channel there are no channels to choose.
"""

import sys

from common.errors import run_command
from experiments.figures import curve, finish, log_axes, new_figure
from experiments.runner import run_study
from experiments.statistics import argmin_mean, cross_validated_best, format_mean_std, mean_std, verdict_lower

TITLE = "Distance and class agreement over the guidance scale"
SAMPLED = "Samples guided as the table says, by {}"  # how the samples are made


def _ways(setup):
    """Ways to guide: (title, scale, arguments of the sampler)."""
    scale, channels = setup.scale, setup.images.channels
    for cfg_scale in scale.guidance_scales:
        yield "all timesteps", cfg_scale, {}
    if channels > 1:
        for cfg_scale in scale.guidance_scales:
            yield f"{channels - 1} of {channels} channels", cfg_scale, dict(cfg_channels=channels - 1)
    for low, high in scale.intervals:
        for cfg_scale in scale.interval_scales:
            yield f"timesteps {low} to {high}", cfg_scale, dict(cfg_interval=(low, high))


def scores(setup):
    """{(title, scale, seed): score}"""
    return {(title, cfg_scale, seed): setup.score(setup.training(*setup.scale.one, seed), seed=seed, **(
        dict(cfg_scale=float(cfg_scale), **more) if cfg_scale > 1 else {}))
        for title, cfg_scale, more in _ways(setup) for seed in setup.scale.seeds}


def results(setup, scores):
    rows = []
    for title, cfg_scale, _ in _ways(setup):
        own = [scores[title, cfg_scale, seed] for seed in setup.scale.seeds]
        rows.append(dict(guided=title, scale=cfg_scale, distance=[score.found() for score in own], **{
            name: [score.found(name) for score in own] for name in ("agreement", "precision", "recall")}))
    size, patch = setup.scale.one
    return dict(seeds=setup.scale.seeds, network=f"{size}/{patch}", rows=rows, **setup.judged(scores))


def table(found):
    yield "guided", "scale", f"distance ({found['samples']} samples)", "agreement with the class", "precision", "recall"
    for row in found["rows"]:
        yield (row["guided"], f"{row['scale']:g}", format_mean_std(row["distance"]),
               f"{mean_std(row['agreement'])[0]:.1%}", format_mean_std(row["precision"]), format_mean_std(row["recall"]))


def draw(found, path):
    figure, axes = new_figure(3, width=4.0, height=3.6)
    for number, title in enumerate(dict.fromkeys(row["guided"] for row in found["rows"])):
        rows = [row for row in found["rows"] if row["guided"] == title]
        curve(axes[0], {row["scale"]: row["distance"] for row in rows}, title, number)
        curve(axes[1], {row["scale"]: [100 * value for value in row["agreement"]] for row in rows}, title, number)
        curve(axes[2], {mean_std(row["recall"])[0]: row["precision"] for row in rows}, title, number)
    log_axes(axes[0])
    axes[0].set(xlabel="guidance scale",
                ylabel=f"Frechet distance ({found['features']}, {found['samples']} samples)")
    axes[1].set(xlabel="guidance scale", ylabel="taken for their class by the classifier, %")
    axes[2].set(xlabel="recall", ylabel="precision")
    finish(figure, axes[0], path, f"{found['network']}, {len(found['seeds'])} seeds")


def claims(found):
    rows = {(row["guided"], row["scale"]): row for row in found["rows"]}
    plain = {scale: row for (title, scale), row in rows.items() if title == "all timesteps"}
    none, most = plain[1], plain[max(plain)]
    guided = {scale: row["distance"] for scale, row in plain.items() if scale > 1}
    best, distance = argmin_mean(guided), cross_validated_best(guided)
    yield ("guidance lowers the distance", "9.62 without, 3.22 at 1.25, 2.27 at 1.5 (FID-50K, XL/2 after 7M steps)",
           f"{format_mean_std(none['distance'])} without, {format_mean_std(distance)} with each seed's scale chosen by the "
           f"others ({best:g} by all)", verdict_lower(distance, none["distance"]))
    rises = best < max(plain)
    yield ("too much of it raises the distance again", "scales near 1.5 are used for FID, 4 for pictures",
           f"{format_mean_std(most['distance'])} at {max(plain):g}" if rises else f"no rise seen up to {max(plain):g}",
           verdict_lower(distance, most["distance"]) if rises else "not clear")
    agreement = [mean_std(row["agreement"])[0] for row in (none, most)]
    yield ("more samples show the class that was asked for", "why guidance is there; no number of this kind",
           f"{agreement[0]:.1%} without, {agreement[1]:.1%} at {max(plain):g}",
           verdict_lower(none["agreement"], most["agreement"]))
    within = {key: row["distance"] for key, row in rows.items() if key[0].startswith("timesteps")}
    if within:
        (title, scale), some = argmin_mean(within), cross_validated_best(within)
        yield ("guidance in an interval of timesteps ends lower than in all", "later work (Kynkaanniemi et al., 2024)",
               f"{format_mean_std(some)} with each seed's interval and scale chosen by the others ({title} at {scale:g} by "
               f"all), {format_mean_std(distance)} in all", verdict_lower(some, distance))


if __name__ == "__main__":
    run_command(lambda: run_study(sys.modules[__name__]))
