"""Compare a DiT with what diffusers computes from the same weights: python -m tools.compare_diffusers.

Outputs of a network with random weights are compared at several timesteps, as a share of the largest: as diffusers
computes them, with the precision of its layer norms as its conversion script leaves it; and with the correction of the
pipeline that convert.py exports.
"""
import common.startup  # noqa: F401

import argparse

import torch

from common.cli import HelpFormatter, non_negative_int, parse_args
from common.errors import UserError, run_command
from models import DiT_models
from networks import build_dit, model_config
from sampling.diffusers_format import to_diffusers, transformer_config

TIMESTEPS = (999, 500, 120, 3)


def build_parser():
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", choices=DiT_models, default="DiT-S/2", help="architecture")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="random seed of weights and inputs")
    return parser


@torch.no_grad()
def compare(network, corrected, norm_eps):
    """Return {timestep: largest difference of the outputs, as a share of the largest output}."""
    from diffusers import DiTTransformer2DModel

    other = DiTTransformer2DModel(**transformer_config(model_config(network)) | dict(norm_eps=norm_eps)).eval()
    other.load_state_dict(to_diffusers(network.state_dict()))
    if corrected:
        for block in other.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, labels, differences = torch.randn(2, *network.sample_shape), torch.tensor([0, 1]), {}
    for timestep in TIMESTEPS:
        t = torch.full((2,), timestep)
        ours, theirs = network(x, t, labels), other(x, timestep=t, class_labels=labels).sample
        differences[timestep] = ((ours - theirs).abs().max() / ours.abs().max()).item()
    return differences


def main():
    """Print a table."""
    flags, _ = parse_args(build_parser())
    try:
        import diffusers
    except ImportError:
        raise UserError("diffusers is not installed: pip install diffusers") from None
    torch.manual_seed(flags.seed)
    network = build_dit(flags.model).eval()
    for weight in network.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.02)
    print(f"{flags.model}, random weights, diffusers {diffusers.__version__}: largest difference / largest output")
    for name, corrected, norm_eps in (("as it is", False, 1e-6), ("as it is, norm_eps 1e-5", False, 1e-5),
                                      ("frequencies corrected, norm_eps 1e-5", True, 1e-5),
                                      ("corrected, as exported", True, 1e-6)):
        values = "   ".join(f"t={t}: {value:.1e}" for t, value in compare(network, corrected, norm_eps).items())
        print(f"{name:38s} {values}")


if __name__ == "__main__":
    run_command(main)
