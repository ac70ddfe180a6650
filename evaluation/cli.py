"""Flags that the commands of evaluate.py share."""
import argparse

from common.cli import add_alias, add_compute_flags, minutes, non_negative_int, positive_int
from common.distributed import DEFAULT_TIMEOUT
from sampling.cli import add_model_flags, add_sampling_flags
from sampling.sample_set import LABEL_DISTRIBUTIONS


def add_feature_flags(parser):
    """Add the flags of the feature space in which sets of images are compared."""
    group = parser.add_argument_group("features")
    group.add_argument("--features", default="inception",
                       help="inception (FID and the rest), pixels (up to 32 x 32), or a TorchScript module's file")
    group.add_argument("--inception", metavar="FILE", help="weights of Inception; default: downloaded once")


def add_generation_flags(parser):
    """Add the flags that only samples of a checkpoint have."""
    add_checkpoint_flags(parser)
    add_sampling_flags(parser, cfg_scale=1.5)
    add_compute_flags(parser)
    group = parser.add_argument_group("samples of a checkpoint")
    group.add_argument("--num-fid-samples", type=positive_int, default=50000, help="number of images")
    group.add_argument("--label-distribution", choices=LABEL_DISTRIBUTIONS, default="uniform",
                       help="random classes (as published), or the same number of images of each")
    add_alias(parser, "--labels", "--label-distribution")


def add_checkpoint_flags(parser):
    """Add the flags of a model and of its random numbers."""
    add_model_flags(parser, vae="ema", ckpt=False)
    parser.add_argument("--global-seed", type=non_negative_int, default=0, help="random seed of labels and noise")


def add_process_flags(parser):
    """Add the flags of each process."""
    group = parser.add_argument_group("processes")
    group.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True,
                       help="TF32 matrix products in the model (never in the features)")
    group.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="batch size per process")
    group.add_argument("--dist-timeout", type=minutes, default=DEFAULT_TIMEOUT, metavar="MINUTES",
                       help="time that a process waits for the others")
    add_alias(parser, "--timeout", "--dist-timeout")
