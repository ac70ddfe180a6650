"""Command lines: argument types, presets, read-only flags, and the compute flags that several commands share."""
import argparse
import math
import os
import sys
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

def number(parse, is_valid=lambda value: True, problem=""):
    """Return an argument type for numbers; `problem` is the error, with {} for the text, if one is not valid."""
    def parse_number(text):
        if not text.strip():
            raise argparse.ArgumentTypeError("it is empty")
        value = parse(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(problem.format(text))
        return value + 0 if value == 0 else value  # -0.0 is 0.0
    parse_number.__name__ = "number"  # argparse shows it: "invalid number value: 'x'"
    return parse_number


positive_int = number(int, lambda value: 1 <= value < 2**63, "{} is not a positive whole number below 2^63")
# Seeds and counts.
non_negative_int = number(int, lambda value: 0 <= value < 2**63, "{} is not a whole number in 0 .. 2^63 - 1")
positive_float = number(float, lambda value: 0 < value < 1e30, "{} is not a positive number that float32 can hold")
minutes = number(positive_float, lambda value: value <= 1e6, "{} minutes are more than a year")
fraction = number(float, lambda value: 0 <= value <= 1, "{} does not lie in 0 .. 1")
decay = number(fraction, lambda value: value < 1,
               "an average with decay 1 never leaves the initial weights; it must be below 1")
guidance_scale = number(float, lambda value: 1 <= value < math.inf,
                        "guidance starts at 1, which means none; {} is not possible")
channels = number(lambda text: "all" if text.lower() == "all" else positive_int(text))


@number
def sampling_steps(text):
    """Parse a number of sampling steps, or one after the name of a sampler, as in "ddim50"; written in one way."""
    for name in ("ddim", "dpm", "unipc", "heun"):
        if text.lower().startswith(name):
            return f"{name}{positive_int(text[len(name):])}"
    return positive_int(text)


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
    """Parse the command line (default: `sys.argv[1:]`) twice, then with defaults that follow from the typed flags.

    Args:
        parser (ArgumentParser): The parser of the command; its defaults are changed.
        presets (callable): (flags, explicit_args) -> dict of defaults for flags that were not typed; --fast adds some.
        argv (list[str]): The command line.

    Returns:
        tuple[ReadOnlyFlags, set[str]]: The flags, and the names of those that were typed.
    """
    _merge_aliases(parser)
    argv = [_expand_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    flags = parser.parse_args(argv)
    untouched = object()
    probe = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(flags), untouched)))
    explicit_args = {name for name, value in vars(probe).items() if value is not untouched}
    for action in parser._actions:
        value = getattr(flags, action.dest, None) if action.dest in explicit_args else None
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        name = "/".join(action.option_strings) or action.metavar or action.dest
        if any(not text.strip() for text in texts):
            parser.error(f"argument {name}: it is empty")
        if unknown := [text for text in texts if text.startswith("~") and action.dest != "class_labels"]:
            parser.error(f"argument {name}: {unknown[0]} is the home folder of an unknown user. Write ./{unknown[0]} "
                         "for a folder of this name")
    defaults = presets(flags, explicit_args) if presets else {}
    if getattr(flags, "fast", False):
        defaults = vars(fastest_config(local_device_type())) | dict(fused_adamw=True) | defaults
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in vars(flags)})
    flags = parser.parse_args(argv, ReadOnlyFlags())
    flags.is_locked = True
    return flags, explicit_args


def add_alias(parser, alias, flag):
    """Accept `alias` as a former name of `flag` in a parser or group, without showing it in the help."""
    parser._option_string_actions[alias] = parser._option_string_actions[flag]


def _expand_home(argument):
    """Expand a "~" that the shell left, in "~/runs" and "--results-dir=~/runs"."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return flag + equals + os.path.expanduser(value)


def _merge_aliases(parser):
    """Accept an abbreviation that fits several names of one flag."""
    find = parser._get_option_tuples
    parser._get_option_tuples = lambda text: list({option[0].dest: option for option in find(text)}.values())


def flag_name(name):
    """Return how a parameter is typed: "cfg_scale" -> "--cfg-scale"."""
    return "--" + name.replace("_", "-")


# ---------------------------------------------------------------- compute flags

def add_compute_flags(parser):
    """Add the flags of a `ComputeConfig`, with the published defaults, and return their group, for further flags."""
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
    """Build the `ComputeConfig` of the compute flags; raise an `ArgumentError` if the device does not support it.

    `log` is called with a line about what --fast chose, and with a warning if nothing can be compiled.
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
