"""Every numeric flag of every command at its extremes, in a process with little memory: a result, or a sentence.

The sentence names the flag, and comes before anything is allocated: nothing is left to the allocator's error.
"""
import contextlib
import importlib
import io
import json
import multiprocessing
import resource
import sys

import psutil
import pytest

from helpers import DIGITS, call
from run_files import folder_of

MEMORY = 4 << 30  # bytes of address space in addition to what the imports take
VALUES = ["-1", "0", "100000000000", "9223372036854775807", "1e300"]
SMALL = ["--max-steps", "1", "--log-every", "1", "--num-workers", "0"]


@pytest.fixture(scope="module")
def places(tmp_path_factory, image_folder, vae_folder):
    """Paths that command lines name: a checkpoint of digits, images, a VAE, and an empty folder."""
    folder = tmp_path_factory.mktemp("silly")
    call("train", *DIGITS, *SMALL, "--results-dir", folder / "runs")
    checkpoint = folder_of(folder / "runs") / "checkpoints" / "0000001.pt"
    return dict(ckpt=checkpoint, images=image_folder, vae=vae_folder, out=folder)


COMMANDS = {
    "train": ["--data-path", "digits", "--model", "DiT-S/2", "--depth", "1", "--hidden-size", "16", "--num-heads", "2",
              "--global-batch-size", "8", *SMALL, "--results-dir", "{out}/more"],
    "train, fractals": ["--data-path", "fractals", "--model", "DiT-S/8", "--depth", "1", "--hidden-size", "16",
                        "--num-heads", "2", "--image-size", "8", "--global-batch-size", "4", *SMALL, "--results-dir",
                        "{out}/more"],
    "sample": ["--ckpt", "{ckpt}", "--num-sampling-steps", "ddim2", "--class-labels", "1", "--output", "{out}/x.png"],
    "sample_ddp": ["--ckpt", "{ckpt}", "--num-sampling-steps", "ddim2", "--num-fid-samples", "2", "--sample-dir",
                   "{out}/set"],
    "extract_features": ["--data-path", "{images}", "--vae", "{vae}", "--image-size", "8", "--num-workers", "0",
                         "--features-path", "{out}/cache"],
    "evaluate, score": ["score", "{ckpt}", "--reference", "{images}", "--features", "pixels", "--num-fid-samples", "4",
                        "--num-sampling-steps", "ddim2", "--output", "{out}/scores.json"],
    "evaluate, reference": ["reference", "digits", "--features", "pixels", "--overwrite", "--output",
                            "{out}/reference.npz"],
    "tools.plan": ["--depth", "1", "--hidden-size", "16", "--num-heads", "2", "--gpu", "h100"],
}


def numeric_flags(parser):
    """List the flags of a parser that take a number, apart from a few."""
    others = {"--max-steps", "--epochs", "--cfg-scale"}  # long runs; images that are not finite have tests of their own
    return [action.option_strings[0] for action in parser._actions
            if action.option_strings and getattr(action.type, "__name__", "") == "number"
            and not others & set(action.option_strings)]


def find_parser(module, line):
    """Return the parser of a command line, of evaluate.py that of its command."""
    name = {"train": "training.cli"}.get(module.__name__, module.__name__)
    parser = importlib.import_module(name).build_parser()
    return parser.parse_known_args(line)[0].parser if module.__name__ == "evaluate" else parser


def try_all(command, line, results):
    """Run a command with each flag at each value, and write {line: [status, stderr]} to a file."""
    from common.errors import run_command
    module = importlib.import_module(command)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY,) * 2)
    outcomes = {}
    for flag in numeric_flags(find_parser(module, line)):
        for value in VALUES:
            sys.argv = [f"{command}.py", *line, f"{flag}={value}"]
            err = io.StringIO()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                    run_command(module.main)
                status = 0
            except SystemExit as stop:
                status = stop.code
            except BaseException as error:
                status = f"{type(error).__name__}: {error}"
            outcomes[f"{flag}={value}"] = [status, err.getvalue()]
    with open(results, "w") as file:
        json.dump(outcomes, file)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_gives_a_result_or_a_sentence_that_names_the_flag(name, places, tmp_path):
    command, results = name.split(",")[0], tmp_path / "results.json"
    line = [part.format(**places) for part in COMMANDS[name]]
    child = multiprocessing.get_context("spawn").Process(target=try_all, args=(command, line, str(results)))
    child.start()
    child.join()
    assert child.exitcode == 0
    outcomes = json.loads(results.read_text())
    assert len(outcomes) >= 2 * len(VALUES)
    wrong = {flag: (status, err[-300:]) for flag, (status, err) in outcomes.items()
             if status not in (0, 2) or (status == 2 and flag.partition("=")[0] not in err)}
    assert not wrong
