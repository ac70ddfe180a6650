"""The command line of evaluate.py: flags of its commands, and their former spellings."""
import argparse
import difflib
import os

from common.cli import add_alias, add_compute_flags, minutes, non_negative_int, positive_int
from common.distributed import DEFAULT_TIMEOUT
from common.errors import UserError
from sampling.cli import add_model_flags, add_sampling_flags
from sampling.sample_set import LABEL_DISTRIBUTIONS


def add_score_flags(parser):
    """Add the flags of `score`."""
    parser.add_argument("samples", metavar="SAMPLES", help="an .npz, a folder, a built-in data set, or a checkpoint")
    parser.add_argument("--reference", required=True, metavar="REF",
                        help="ADM's .npz, an output of `evaluate.py reference`, or images: an .npz, a folder, ...")
    parser.add_argument("--output", metavar="FILE", help="the record; default: SAMPLES.scores.json")
    add_feature_flags(parser)
    add_generation_flags(parser)
    add_process_flags(parser)


def add_reference_flags(parser):
    """Add the flags of `reference`."""
    parser.add_argument("data", metavar="DATA", help="images: an .npz, a folder, or a built-in data set")
    parser.add_argument("--output", required=True, metavar="FILE", help="the reference, an .npz")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE even if it holds something else")
    parser.add_argument("--image-size", type=positive_int, help="pixels that images of a folder are cropped to")
    parser.add_argument("--num-classes", type=positive_int, help="number of classes of fractals")
    parser.add_argument("--global-seed", type=int, help=argparse.SUPPRESS)  # accepted formerly, without effect
    add_feature_flags(parser)
    add_process_flags(parser)


def add_nll_flags(parser):
    """Add the flags of `nll`."""
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint: .pt or .safetensors")
    parser.add_argument("--data", required=True, help="a folder of class folders of images, digits-held-out, ...")
    parser.add_argument("--output", metavar="FILE", help="the record; default: CKPT.nll.json")
    parser.add_argument("--num-images", type=positive_int, default=1000,
                        help="images, evenly spaced over the data; 1000 forward passes each")
    add_alias(parser, "--nll-images", "--num-images")
    add_checkpoint_flags(parser)
    add_process_flags(parser)


def add_diff_flags(parser):
    """Add the arguments of `diff`."""
    parser.add_argument("records", nargs=2, metavar="RECORD", help="JSON files of score or nll")


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


# What a former flag becomes: a command, and the flag in its place.
FORMER_SPELLINGS = {"--reference": ("score", ["--reference"]), "--make-reference": ("reference", []),
                    "--nll": ("nll", ["--data"]), "--diff": ("diff", [])}


def translate_former_spelling(argv):
    """Translate a command line without a command: `CKPT --nll DATA` becomes `nll CKPT --data DATA`."""
    commands = [command for command, _ in FORMER_SPELLINGS.values()]
    if argv and argv[0] in commands:
        return argv
    if argv and argv[0].isalpha() and not os.path.exists(argv[0]):
        for command in difflib.get_close_matches(argv[0].lower(), commands, n=1):
            raise UserError(f"{argv[0]}: there is no such command. Did you mean {command}?")
    for position, argument in enumerate(argv):
        flag, *value = argument.split("=", 1)
        if flag in FORMER_SPELLINGS:
            command, replacement = FORMER_SPELLINGS[flag]
            return [command, *argv[:position], *replacement, *value, *argv[position + 1:]]
    return argv
