"""Figure 10: compute of sampling does not make up for compute of the network. The networks are those of `scaling`."""
import itertools

from experiments.cli import main
from experiments.statistics import mean_std, verdict_of_share
from experiments.study import Study


def rows(preset):
    """Networks of all sizes in all numbers of sampling steps."""
    sampling = {steps: dict(samples=preset.step_samples, steps=steps) for steps in preset.step_counts}
    networks = [dict(size=size, patch=patch) for size, patch in itertools.product(preset.sizes, preset.step_patches)]
    return [(network, network, sampling) for network in networks]


def panels(results):
    """Draw the distance against the compute of sampling, a panel for each patch size."""
    counts = ", ".join(str(steps) for steps, _ in results["rows"][0]["distance"])
    for patch in dict.fromkeys(row["patch"] for row in results["rows"]):
        lines = {f"{row['size']}/{patch}": {steps * row["multiply_adds"] / 1e9: values
                                            for steps, values in row["distance"]}
                 for row in results["rows"] if row["patch"] == patch}
        yield dict(lines=lines, xlabel=f"multiply-adds of sampling an image, 10⁹\n({counts} steps)", log="xy",
                   legend="")


def claims(results):
    """Compare small networks in most steps with larger ones of no more compute."""
    wins = []
    for small, large in itertools.permutations(results["rows"], 2):
        if small["patch"] != large["patch"] or small["multiply_adds"] >= large["multiply_adds"]:
            continue
        most, distance = small["distance"][-1]
        cheaper = [values for steps, values in large["distance"]
                   if steps * large["multiply_adds"] <= most * small["multiply_adds"]]
        if cheaper:
            wins.append(mean_std(cheaper[-1])[0] < mean_std(distance)[0])
    if wins:
        yield ("a smaller network with most steps stays behind a larger one with no more compute for an image",
               "as we remember it: L/2 with 1000 steps (80.7 Tflops) 25.9, XL/2 with 128 (15.2 Tflops) 23.7",
               f"so in {sum(wins)} of {len(wins)} pairs of the same patch size", verdict_of_share(wins))


STUDY = Study(
    name="sampling_steps", title="Distance against the compute of sampling", rows=rows, panels=panels, claims=claims,
    columns={"network": lambda row: f"{row['size']}/{row['patch']}",
             "multiply-adds": lambda row: f"{row['multiply_adds'] / 1e6:.2f} M"},
    x_heading="{} steps".format, seeds="grid_seeds",
    sampled="Samples without guidance, by DDPM in the steps of the table")

if __name__ == "__main__":
    main(STUDY)
