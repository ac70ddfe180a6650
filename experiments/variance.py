"""Learned against fixed variances in few steps: why the network learns its variance (Improved DDPM).

The networks are those of `block_types` with adaLN-Zero; only the noise of a sampling step differs. DDIM adds none.
"""
from common.errors import run_command
from evaluation.plots import new_figure
from experiments.figures import add_legend, distance_label, draw_lines
from experiments.runner import run_study
from experiments.statistics import mean_std, verdict_lower, verdict_of_all
from experiments.study import Study

NAMES = {"learned": "learned", "fixed_small": "fixed, posterior's (small)", "fixed_large": "fixed, beta (large)",
         "ddim": "DDIM"}
FEW = 25  # sampling steps


def rows(preset, data):
    """Each variance, and DDIM, in all numbers of sampling steps; DDIM needs evenly spaced ones."""
    for name in ("learned", "fixed_small", "fixed_large"):
        yield dict(variance=name), {}, {steps: dict(steps=steps, variance=name) for steps in preset.variance_steps}
    yield dict(variance="ddim"), {}, {steps: dict(steps=f"ddim{steps}") for steps in preset.variance_steps
                                      if 1000 % steps == 0}


def draw(results):
    """Draw the distance over sampling steps, a line for each variance."""
    figure, (axis,) = new_figure(1, width=5.0, height=3.6)
    draw_lines(axis, {NAMES[row["variance"]]: dict(row["distance"]) for row in results["rows"]},
               "sampling steps", distance_label(results), "xy",
               {steps: str(steps) for steps, _ in results["rows"][0]["distance"]})
    add_legend(axis, f"{results['network']}, {len(results['seeds'])} seeds")
    return figure


def claims(results):
    """Compare the learned variance with the fixed ones in few steps."""
    distance = {row["variance"]: dict(row["distance"]) for row in results["rows"]}
    few = [steps for steps in distance["learned"] if steps <= FEW]
    for name in ("fixed_large", "fixed_small"):
        pairs = {steps: (distance["learned"][steps], distance[name][steps]) for steps in few}
        numbers = "; ".join(f"{mean_std(learned)[0]:.2f} against {mean_std(fixed)[0]:.2f} in {steps}"
                            for steps, (learned, fixed) in pairs.items())
        yield (f"in few steps the learned variance is better than the {NAMES[name]} one",
               "no comparison; as we remember Improved DDPM: so", numbers,
               verdict_of_all(verdict_lower(*pair) for pair in pairs.values()))


STUDY = Study("variance", "Distance over sampling steps, by the variance of a step", rows,
              {"variance": lambda row: NAMES[row["variance"]]}, draw, claims, "{} steps".format,
              sampled="Samples without guidance, by DDPM with these variances, or DDIM, in the steps of the table")

if __name__ == "__main__":
    run_command(lambda: run_study(STUDY))
