"""The decay of the EMA and the length of training: several averages of the same trainings."""
from common.errors import run_command
from evaluation.plots import new_figure
from experiments.figures import add_legend, distance_label, draw_lines
from experiments.runner import run_study
from experiments.statistics import argmin_mean, cross_validated_best, format_mean_std, verdict_lower, verdict_same_sign
from experiments.study import Study


def rows(preset, data):
    """All decays after a part of the training and at its end; train.py keeps all averages of one training."""
    decays = tuple(decay for decay in preset.decays if decay != preset.ema_decay)
    return [(dict(step=step), dict(decays=decays), {decay: dict(after=step, decay=decay) for decay in preset.decays})
            for step in preset.snapshot_steps]


def _window(decay):
    """Return about how many steps an average spans; without one, a place beside them on the logarithmic axis."""
    return 1 / (1 - decay) if decay else 0.3


def draw(results):
    """Draw the distance over the decay, a line for each length of training."""
    figure, (axis,) = new_figure(1, width=5.0, height=3.6)
    lines = {f"{row['step']} steps": {_window(decay): values for decay, values in row["distance"]}
             for row in results["rows"]}
    draw_lines(axis, lines, "decay of the average (placed at 1 / (1 - decay) steps)", distance_label(results), "xy",
               {_window(decay): f"{decay:g}" if decay else "none" for decay, _ in results["rows"][0]["distance"]})
    add_legend(axis, f"{results['network']}, {len(results['seeds'])} seeds, after")
    return figure


def claims(results):
    """Compare averages with the weights, and the best decays after short and long training."""
    first, last = (dict(results["rows"][i]["distance"]) for i in (0, -1))
    averaged = {decay: values for decay, values in last.items() if decay}
    best = cross_validated_best(averaged)
    yield ("averaged weights are better than the weights themselves", "0.9999 throughout",
           f"{format_mean_std(best)} with each seed's decay chosen by the others ({argmin_mean(averaged):g} by all), "
           f"{format_mean_std(last[0])} without", verdict_lower(best, last[0]))
    if len(results["rows"]) > 1:
        before, after = ([_best_decay(row, seed) for seed in range(len(results["seeds"]))] for row in (first, last))
        steps = [row["step"] for row in results["rows"]]
        decays = " against ".join(", ".join(f"{decay:g}" for decay in seeds) for seeds in (before, after))
        yield ("a longer training wants a longer average", "no comparison",
               f"{decays} are the seeds' best decays after {steps[0]} against {steps[-1]} steps",
               verdict_same_sign([late - early for early, late in zip(before, after)]))


def _best_decay(distance, seed):
    return min((decay for decay in distance if decay), key=lambda decay: distance[decay][seed])


STUDY = Study("ema_decay", "Distance over the decay of the moving average", rows,
              {"steps": lambda row: f"{row['step']}"}, draw, claims,
              lambda decay: f"decay {decay:g}" if decay else "no average")

if __name__ == "__main__":
    run_command(lambda: run_study(STUDY))
