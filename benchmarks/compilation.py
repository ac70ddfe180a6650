"""Start and speed of training if one block is compiled for all, as train.py does, and if the whole network is."""
import torch

from benchmarks.timing import compare, format_speed, run_benchmark
from benchmarks.train import OurStep
from common.compute import ComputeConfig
from models import DiT_models


def measure(device, model="DiT-S/4", batch=16, image_size=256, count=7, calls=2):
    """Return the seconds of the first step, with compilation and without caches, and of the steps after it."""
    size = image_size // 8
    compute = ComputeConfig(compile=True, attention="math" if device == "cpu" else "auto")
    latents = torch.randn(batch, 4, size, size, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def builder(is_whole):
        def build():
            torch.manual_seed(0)
            network = DiT_models[model](input_size=size).to(device).train()
            step = OurStep(network, device, batch, ComputeConfig(attention=compute.attention) if is_whole else compute)
            if is_whole:
                network.compile(dynamic=False, options=compute.compiler_options())
            return lambda: step(latents, labels)
        return build

    with torch._inductor.config.patch(force_disable_caches=True):
        rows = compare({"the whole network in one graph": builder(True), "one block for all": builder(False)}, device,
                       warm_up=1, count=count, calls=calls)
    for row in rows.values():
        if "seconds" in row:
            row["images_per_second"] = batch / row["seconds"]
    return rows


def format_row(name, row):
    """Return the line of a row."""
    return format_speed(name, row, "step") + f"   first step {row.get('warm_up_seconds', 0):.1f} s"


def main():
    """Run the benchmark from the command line."""
    run_benchmark("compilation", measure, format_row, __doc__)


if __name__ == "__main__":
    main()
