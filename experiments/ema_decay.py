"""The decay of the EMA and the length of training: several averages of the same trainings."""
from experiments.cli import main
from experiments.statistics import argmin_mean, cross_validated_best, format_mean_std, verdict_lower
from experiments.study import Study


def rows(preset):
    """All decays after a part of the training and at its end; train.py keeps all averages of one training."""
    decays = tuple(decay for decay in preset.decays if decay != preset.ema_decay)
    return [(dict(step=step), dict(decays=decays), {decay: dict(after=step, decay=decay) for decay in preset.decays})
            for step in preset.snapshot_steps]


def panels(results):
    """Draw the distance over the decay, a line for each length of training."""
    decays = [decay for decay, _ in results["rows"][0]["distance"]]
    # About how many steps an average spans; without one, a place beside them on the logarithmic axis.
    window = {decay: 1 / (1 - decay) if decay else 0.3 for decay in decays}
    yield dict(lines={f"{row['step']} steps": {window[decay]: values for decay, values in row["distance"]}
                      for row in results["rows"]},
               xlabel="decay of the average (placed at 1 / (1 - decay) steps)", log="xy",
               xticks={window[decay]: f"{decay:g}" if decay else "none" for decay in decays},
               legend=f"{results['network']}, {len(results['seeds'])} seeds, after")


def claims(results):
    """Compare averages with the weights, and the best decays after short and long training."""
    first, last = (dict(results["rows"][i]["distance"]) for i in (0, -1))
    averaged = {decay: values for decay, values in last.items() if decay}
    best = cross_validated_best(averaged)
    yield ("averaged weights are better than the weights themselves", "0.9999 throughout",
           f"{format_mean_std(best)} with each seed's decay chosen by the others ({argmin_mean(averaged):g} by all), "
           f"{format_mean_std(last[0])} without", verdict_lower(best, last[0]))
    if len(results["rows"]) > 1:
        seeds = range(len(results["seeds"]))
        before, after = ([min(averaged, key=lambda decay: row[decay][seed]) for seed in seeds] for row in (first, last))
        decays = " against ".join(", ".join(f"{decay:g}" for decay in best) for best in (before, after))
        yield ("a longer training wants a longer average", "no comparison",
               f"{decays} are the seeds' best decays after {results['rows'][0]['step']} against "
               f"{results['rows'][-1]['step']} steps", verdict_longer(before, after))


def verdict_longer(before, after):
    """Return whether the decays of all seeds, if there are several, are larger ("yes") or smaller ("no") after."""
    differences = [late - early for early, late in zip(before, after)]
    if len(differences) < 2 or not (min(differences) > 0 or max(differences) < 0):
        return "not clear"
    return "yes" if differences[0] > 0 else "no"


STUDY = Study(name="ema_decay", title="Distance over the decay of the moving average", rows=rows, panels=panels,
              claims=claims, columns={"steps": lambda row: f"{row['step']}"},
              x_heading=lambda decay: f"decay {decay:g}" if decay else "no average")

if __name__ == "__main__":
    main(STUDY)
