"""Command lines: argument types, presets, read-only flags, and the compute flags that several commands share."""
import argparse
import os
from dataclasses import replace

from common.compute import (
    ATTENTION_CHOICES,
    PRECISIONS,
    ComputeConfig,
    fastest_config,
    find_compiler_error,
    local_device_type,
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show the description as it is written, and the default of every flag that has one."""

    def _get_help_string(self, action):
        text = action.help or ""
        is_off = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        if is_off or "default" in text or not action.option_strings:
            return text
        default = action.default
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{text} (default: {shown})".strip()


# ---------------------------------------------------------------- argument types

def number(parse):
    """Mark an argument type, so that argparse reports "invalid number value: 'x'" for text that is not a number."""
    parse.__name__ = "number"
    return parse


@number
def positive_int(text):
    """Parse an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


@number
def non_negative_int(text):
    """Parse an integer that a seed or a count can be: 0 to 2^63 - 1."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number in 0 .. 2^63 - 1")
    return value


@number
def positive_float(text):
    """Parse a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


@number
def minutes(text):
    """Parse a positive number of minutes that a timeout can hold."""
    value = positive_float(text)
    if value > 1e6:
        raise argparse.ArgumentTypeError(f"{text} minutes are more than a year")
    return value


@number
def fraction(text):
    """Parse a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 0 .. 1")
    return value


@number
def decay(text):
    """Parse the decay of a moving average: a number in [0, 1)."""
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError("an average with decay 1 never leaves the initial weights; it must be below 1")
    return value


@number
def guidance_scale(text):
    """Parse a scale of classifier-free guidance: a finite number of at least 1."""
    value = float(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"guidance starts at 1, which means none; {text} is not possible")
    return value


@number
def channels(text):
    """Parse a number of channels, or "all"."""
    return text if text == "all" else positive_int(text)


@number
def sampling_steps(text):
    """Parse a number of sampling steps, or "ddimN"."""
    return text if text.startswith("ddim") else positive_int(text)


# ---------------------------------------------------------------- parsing

class ReadOnlyFlags(argparse.Namespace):
    """Flags of a command; once locked, assigning one raises `AttributeError`."""

    __slots__ = ("is_locked",)

    def __setattr__(self, name, value):
        if getattr(self, "is_locked", False):
            raise AttributeError(f"flags are read-only after parsing: {name}")
        super().__setattr__(name, value)


def path_or_name(text):
    """Return a directory as an absolute path, so that a checkpoint can store it; any other text as it is."""
    return os.path.abspath(text) if os.path.isdir(text) else text


def parse_args(parser, presets=None, argv=None):
    """Parse the command line twice: the second time with the defaults that follow from the explicit arguments.

    Args:
        parser (ArgumentParser): The parser of the command; its defaults are changed.
        presets (callable): (flags, explicit_args) -> dict of defaults for flags that were not typed. --fast adds its
            own.
        argv (list[str]): The command line. Default: `sys.argv[1:]`.

    Returns:
        tuple[ReadOnlyFlags, set[str]]: The flags, and the names of those that were typed.
    """
    flags = parser.parse_args(argv)
    untouched = object()
    probe = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(flags), untouched)))
    explicit_args = {name for name, value in vars(probe).items() if value is not untouched}
    defaults = presets(flags, explicit_args) if presets else {}
    if getattr(flags, "fast", False):
        defaults = vars(fastest_config(local_device_type())) | dict(fused_adamw=True) | defaults
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in vars(flags)})
    flags = parser.parse_args(argv, ReadOnlyFlags())
    flags.is_locked = True
    return flags, explicit_args


def add_alias(parser, alias, flag):
    """Accept `alias` as a former name of `flag`, without showing it in the help.

    Args:
        parser (ArgumentParser): The parser, or the group, that has the flag.
        alias (str): Former name, such as "--labels".
        flag (str): Present name, such as "--label-distribution".
    """
    parser._option_string_actions[alias] = parser._option_string_actions[flag]


def flag_name(name):
    """Return how a parameter is typed: "cfg_scale" -> "--cfg-scale"."""
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------- compute flags

def add_compute_flags(parser):
    """Add the flags that make up a `ComputeConfig`; their defaults compute as the published code does.

    Returns:
        The group of the flags, to which a command can add others.
    """
    group = parser.add_argument_group("speed")
    group.add_argument("--fast", action="store_true",
                       help="the fastest settings of this device; explicit flags take precedence")
    group.add_argument("--precision", choices=PRECISIONS, default="tf32",
                       help="precision of the network: TF32 matrix products on GPUs that have them (as published), "
                            "fp32, or bf16 by autocast")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                       help="compile the model with torch.compile")
    group.add_argument("--cuda-graphs", action="store_true",
                       help="CUDA graphs, with --compile: one launch per pass; for small models and small batches")
    group.add_argument("--attention", choices=ATTENTION_CHOICES, default="auto", help="attention kernel")
    return group


def build_compute_config(flags, device, log):
    """Build the `ComputeConfig` of the compute flags and check it on this device.

    Args:
        flags (Namespace): Flags with those of `add_compute_flags`.
        device (torch.device): The device of this rank.
        log (callable): Called with a line about what --fast chose, and with a warning if nothing can be compiled.

    Returns:
        ComputeConfig: How the network is computed.

    Raises:
        ArgumentError: If the device does not support the precision or the attention kernel.
    """
    if flags.fast:
        switches = [flag_name(name) for name in ("fused_adamw", "cuda_graphs") if getattr(flags, name, False)]
        log(" ".join(["--fast: --precision", flags.precision, "--compile" if flags.compile else "--no-compile",
                      "--attention", flags.attention, *switches]))
    compute = ComputeConfig(flags.precision, flags.compile, flags.attention, flags.cuda_graphs)
    compute.check(device)
    if compute.compile and (reason := find_compiler_error(device)):
        log(f"WARNING: --compile: there is no working compiler here ({reason}); continuing without it")
        compute = replace(compute, compile=False, cuda_graphs=False)
    return compute
