"""Learned against fixed variances in few steps: why the network learns its variance (Improved DDPM).

The networks are those of `block_types` with adaLN-Zero; only the noise of a sampling step differs. DDIM adds none.
"""
from experiments.cli import main
from experiments.statistics import mean_std, verdict_lower
from experiments.study import Study

NAMES = {"learned": "learned", "fixed_small": "fixed, posterior's (small)", "fixed_large": "fixed, beta (large)",
         "ddim": "DDIM"}
FEW = 25  # sampling steps


def rows(preset):
    """Each variance, and DDIM, in all numbers of sampling steps; DDIM needs evenly spaced ones."""
    for name in ("learned", "fixed_small", "fixed_large"):
        yield dict(variance=name), {}, {steps: dict(steps=steps, variance=name) for steps in preset.variance_steps}
    yield dict(variance="ddim"), {}, {steps: dict(steps=f"ddim{steps}") for steps in preset.variance_steps
                                      if 1000 % steps == 0}


def panels(results):
    """Draw the distance over sampling steps, a line for each variance."""
    yield dict(lines={NAMES[row["variance"]]: dict(row["distance"]) for row in results["rows"]},
               xlabel="sampling steps", log="xy",
               xticks={steps: str(steps) for steps, _ in results["rows"][0]["distance"]},
               legend=f"{results['network']}, {len(results['seeds'])} seeds")


def claims(results):
    """Compare the learned variance with the fixed ones in few steps."""
    distance = {row["variance"]: dict(row["distance"]) for row in results["rows"]}
    for name in ("fixed_large", "fixed_small"):
        pairs = {steps: (learned, distance[name][steps]) for steps, learned in distance["learned"].items()
                 if steps <= FEW}
        numbers = "; ".join(f"{mean_std(learned)[0]:.2f} against {mean_std(fixed)[0]:.2f} in {steps}"
                            for steps, (learned, fixed) in pairs.items())
        verdicts = {verdict_lower(*pair) for pair in pairs.values()}
        yield (f"in few steps the learned variance is better than the {NAMES[name]} one",
               "no comparison; as we remember Improved DDPM: so", numbers,
               verdicts.pop() if len(verdicts) == 1 else "not clear")


STUDY = Study(
    name="variance", title="Distance over sampling steps, by the variance of a step", rows=rows, panels=panels,
    claims=claims, columns={"variance": lambda row: NAMES[row["variance"]]}, x_heading="{} steps".format,
    sampled="Samples without guidance, by DDPM with these variances, or DDIM, in the steps of the table")

if __name__ == "__main__":
    main(STUDY)
