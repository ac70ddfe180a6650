"""Figure 5: the block types on equal terms: the same size, data, steps and seeds; distance over the training's steps.

    python -m experiments.block_types
"""

import sys

from common.errors import run_command
from experiments.figures import curve, finish, log_axes, new_figure
from experiments.job_types import curve_of, multiply_adds, parameters
from experiments.runner import run_study
from experiments.statistics import format_mean_std, mean_std, verdict_lower

TITLE = "Distance over training steps, by block type"
# What the paper found (table 4): FID-50K of DiT-XL/2 after 400K steps without guidance. PixArt-alpha added the last.
PAPER = {"in-context": 35.24, "cross-attention": 26.14, "adaln": 25.21, "adaln-zero": 19.47, "adaln-single": None}


def scores(setup):
    """{(type, seed): score}"""
    return {(name, seed): setup.score(setup.training(*setup.scale.one, seed, name), seed=seed)
            for name in PAPER for seed in setup.scale.seeds}


def results(setup, scores):
    size, patch = setup.scale.one
    rows = []
    for name in PAPER:
        own = [scores[name, seed] for seed in setup.scale.seeds]
        network = setup.network(size, patch) | dict(conditioning=name)
        rows.append(dict(
            type=name, parameters=parameters(network), multiply_adds=multiply_adds(network), curve=curve_of(own),
            distance=[score.found() for score in own], agreement=[score.found("agreement") for score in own]))
    return dict(seeds=setup.scale.seeds, network=f"{size}/{patch}", rows=rows, **setup.judged(scores))


def table(found):
    yield ("block", "parameters", "multiply-adds", f"distance ({found['samples']} samples)", "agreement with the class",
           "the paper: DiT-XL/2, FID-50K")
    for row in found["rows"]:
        yield (row["type"], f"{row['parameters']:,}", f"{row['multiply_adds'] / 1e6:.3f} M",
               format_mean_std(row["distance"]), f"{mean_std(row['agreement'])[0]:.1%}",
               f"{PAPER[row['type']] or '(PixArt-alpha)'}")


def draw(found, path):
    figure, (axis,) = new_figure(1, width=5.5, height=3.6)
    for number, row in enumerate(found["rows"]):
        curve(axis, dict(row["curve"]), row["type"], number)
    log_axes(axis)
    axis.set(xlabel="training steps",
             ylabel=f"Frechet distance ({found['features']},\n{found['curve_samples']} samples, "
                    f"{len(found['seeds'])} seeds ± 1 s.d.)")
    finish(figure, axis, path, f"DiT {found['network']}, {found['data']}")


def claims(found):
    distance = {row["type"]: row["distance"] for row in found["rows"]}
    for other in ("adaln", "cross-attention", "in-context"):
        yield (f"adaLN-Zero ends lower than {other}", f"FID {PAPER['adaln-zero']} against {PAPER[other]}",
               f"{format_mean_std(distance['adaln-zero'])} against {format_mean_std(distance[other])}",
               verdict_lower(distance["adaln-zero"], distance[other]))


if __name__ == "__main__":
    run_command(lambda: run_study(sys.modules[__name__]))
