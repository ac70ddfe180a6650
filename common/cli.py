"""Flags that several commands share, and the kinds of values that flags take."""

import argparse
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
    """Shows the description as it is written, and every flag's default."""

    def _get_help_string(self, action):
        text = action.help or ""
        is_off = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
        if is_off or "default" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)".strip()


def positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def non_negative_int(text):
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number in 0 .. 2^63 - 1")
    return value


def positive_float(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def minutes(text):
    value = positive_float(text)
    if value > 1e6:
        raise argparse.ArgumentTypeError(f"{text} minutes are more than a year")
    return value


def fraction(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 0 .. 1")
    return value


def decay(text):
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError("an average with decay 1 never leaves the initial weights; it must be below 1")
    return value


def guidance_scale(text):
    value = float(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"guidance starts at 1, which means none; {text} is not possible")
    return value


def channels(text):
    return text if text == "all" else positive_int(text)


def sampling_steps(text):
    """A number of steps, or "ddimN"."""
    return text if text.startswith("ddim") else positive_int(text)


for kind in (positive_int, non_negative_int, positive_float, minutes, fraction, decay, guidance_scale, channels, sampling_steps):
    kind.__name__ = "number"  # argparse says "invalid number value: 'x'" where the text is none


class ReadOnlyFlags(argparse.Namespace):
    """Flags of a command. After parsing they cannot be changed, so that they mean the same everywhere."""

    __slots__ = ("is_locked",)

    def __setattr__(self, name, value):
        if getattr(self, "is_locked", False):
            raise AttributeError(f"flags are read-only after parsing: {name}")
        super().__setattr__(name, value)


def parse_args(parser, presets=None, argv=None):
    """Parse the command line twice: the second time with the defaults that follow from what was typed.

    Args:
        parser (ArgumentParser): The parser of the command; its defaults are changed.
        presets (callable): (flags, explicit) -> dict of defaults for flags that were not typed. --fast adds its own.
        argv (list[str]): The command line. Default: `sys.argv[1:]`.

    Returns:
        tuple[ReadOnlyFlags, set[str]]: The flags, and the names of those that were typed.
    """
    flags = parser.parse_args(argv)
    untouched = object()
    probe = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(flags), untouched)))
    explicit = {name for name, value in vars(probe).items() if value is not untouched}
    defaults = presets(flags, explicit) if presets else {}
    if getattr(flags, "fast", False):
        defaults = vars(fastest_config(local_device_type())) | dict(fused_adamw=True) | defaults
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in vars(flags)})
    flags = parser.parse_args(argv, ReadOnlyFlags())
    # flags.is_locked = True  (once train.py keeps to it)
    return flags, explicit


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


def add_compute_flags(parser):
    """How the network is computed; without them as published. Returns the group."""
    group = parser.add_argument_group("speed")
    group.add_argument("--fast", action="store_true", help="what is fastest on this device; flags that are typed win")
    group.add_argument("--precision", choices=PRECISIONS, default="tf32",
                       help="of the network: tf32 where the GPU has it (as published), fp32, or bf16 by autocast")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="by torch.compile")
    group.add_argument("--cuda-graphs", action="store_true",
                       help="with --compile: launch a pass as a whole; for small models, and sampling few at once")
    group.add_argument("--attention", choices=ATTENTION_CHOICES, default="auto", help="which kernel")
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
