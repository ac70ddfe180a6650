"""The decay of the EMA and the length of training: several averages of the same trainings.

    python -m experiments.ema_decay
"""
from common.errors import run_command
from experiments.figures import add_legend, distance_label, draw_lines, new_figure
from experiments.runner import run_study
from experiments.statistics import argmin_mean, cross_validated_best, format_mean_std, verdict_lower, verdict_same_sign
from experiments.study import Study, make_table


def rows(context):
    preset = context.preset
    decays = tuple(decay for decay in preset.decays if decay != preset.ema_decay)
    trainings = {seed: context.training(*preset.network, seed, decays=decays) for seed in preset.seeds}
    for step in context.snapshot_steps():
        yield dict(step=step), {decay: [context.score(training, seed=seed, after=step, decay=decay)
                                        for seed, training in trainings.items()] for decay in preset.decays}


def table(results):
    return make_table(results["rows"], {"steps": lambda row: f"{row['step']}"},
                      lambda decay: f"decay {decay:g}" if decay else "no average")


def _window(decay):
    """Return about how many steps an average spans; without one, a place beside them on the logarithmic axis."""
    return 1 / (1 - decay) if decay else 0.3


def draw(results):
    figure, (axis,) = new_figure(1, width=5.0, height=3.6)
    lines = {f"{row['step']} steps": {_window(decay): values for decay, values in row["distance"]}
             for row in results["rows"]}
    draw_lines(axis, lines, "decay of the average (placed at 1 / (1 - decay) steps)", distance_label(results), "xy",
               {_window(decay): f"{decay:g}" if decay else "none" for decay, _ in results["rows"][0]["distance"]})
    add_legend(axis, f"{results['network']}, {len(results['seeds'])} seeds, after")
    return figure


def claims(results):
    first, last = (dict(map(tuple, results["rows"][i]["distance"])) for i in (0, -1))
    averaged = {decay: values for decay, values in last.items() if decay}
    best = cross_validated_best(averaged)
    yield ("averaged weights are better than the weights themselves", "0.9999 throughout",
           f"{format_mean_std(best)} with each seed's decay chosen by the others ({argmin_mean(averaged):g} by all), "
           f"{format_mean_std(last[0])} without", verdict_lower(best, last[0]))
    if len(results["rows"]) > 1:
        before, after = ([_best_decay(row, seed) for seed in range(len(results["seeds"]))] for row in (first, last))
        yield ("a longer training wants a longer average", "no comparison",
               f"{', '.join(f'{decay:g}' for decay in before)} against {', '.join(f'{decay:g}' for decay in after)} are "
               f"the seeds' best decays after {results['rows'][0]['step']} against {results['rows'][-1]['step']} steps",
               verdict_same_sign([late - early for early, late in zip(before, after)]))


def _best_decay(distance, seed):
    return min((decay for decay in distance if decay), key=lambda decay: distance[decay][seed])


STUDY = Study("ema_decay", "Distance over the decay of the moving average", rows, table, draw, claims)

if __name__ == "__main__":
    run_command(lambda: run_study(STUDY))
