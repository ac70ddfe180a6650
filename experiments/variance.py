"""Learned against fixed variances in few steps: why the network learns its variance (Improved DDPM).

    python -m experiments.variance

The networks are those of `block_types` with adaLN-Zero; only the noise of a sampling step differs. DDIM adds none.
"""
from common.errors import run_command
from experiments.figures import add_legend, distance_label, draw_lines, new_figure
from experiments.runner import run_study
from experiments.statistics import mean_std, verdict_lower, verdict_of_all
from experiments.study import Study, make_table

NAMES = {"learned": "learned", "fixed_small": "fixed, posterior's (small)", "fixed_large": "fixed, beta (large)",
         "ddim": "DDIM"}
FEW = 25  # sampling steps


def rows(context):
    trainings = {seed: context.training(*context.preset.network, seed) for seed in context.preset.seeds}
    for name in NAMES:
        scores = {}
        for steps in context.preset.variance_steps:
            sampling = dict(steps=f"ddim{steps}") if name == "ddim" else dict(steps=steps, variance=name)
            if name != "ddim" or 1000 % steps == 0:  # DDIM needs evenly spaced steps
                scores[steps] = [context.score(training, seed=seed, **sampling) for seed, training in trainings.items()]
        yield dict(variance=name), scores


def table(results):
    return make_table(results["rows"], {"variance": lambda row: NAMES[row["variance"]]}, "{} steps".format)


def draw(results):
    figure, (axis,) = new_figure(1, width=5.0, height=3.6)
    draw_lines(axis, {NAMES[row["variance"]]: dict(map(tuple, row["distance"])) for row in results["rows"]},
               "sampling steps", distance_label(results), "xy",
               {steps: str(steps) for steps, _ in results["rows"][0]["distance"]})
    add_legend(axis, f"{results['network']}, {len(results['seeds'])} seeds")
    return figure


def claims(results):
    distance = {row["variance"]: dict(map(tuple, row["distance"])) for row in results["rows"]}
    few = [steps for steps in distance["learned"] if steps <= FEW]
    for name in ("fixed_large", "fixed_small"):
        pairs = {steps: (distance["learned"][steps], distance[name][steps]) for steps in few}
        numbers = "; ".join(f"{mean_std(learned)[0]:.2f} against {mean_std(fixed)[0]:.2f} in {steps}"
                            for steps, (learned, fixed) in pairs.items())
        yield (f"in few steps the learned variance is better than the {NAMES[name]} one",
               "no comparison; as we remember Improved DDPM: so", numbers,
               verdict_of_all(verdict_lower(*pair) for pair in pairs.values()))


STUDY = Study("variance", "Distance over sampling steps, by the variance of a step", rows, table, draw, claims,
              sampled="Samples without guidance, by DDPM with these variances, or DDIM, in the steps of the table")

if __name__ == "__main__":
    run_command(lambda: run_study(STUDY))
