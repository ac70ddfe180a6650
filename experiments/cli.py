"""The command line of the studies: run the tasks of one, then store its results and write the page."""
import argparse
import functools
import os
import shlex
import sys
import time
from dataclasses import replace

from common.cli import HelpFormatter, parse_args, positive_float, positive_int
from common.errors import ArgumentError, Stopped, run_command
from evaluation.records import write_record
from experiments.jobs import run_tasks
from experiments.presets import PRESETS
from experiments.report import draw_results, format_table, results_name, write_page
from experiments.study import StudyTasks, device_type


def build_parser(description):
    """Build the parser of the flags that all studies have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    data, scales = (sorted(set(names)) for names in zip(*PRESETS))
    parser.add_argument("--data", choices=data, default="digits", help="digits: two CPU cores; fractals: a GPU")
    parser.add_argument("--scale", choices=scales, default="miniature",
                        help="preset of experiments/presets.py; paper: the paper's networks, on the fractals")
    parser.add_argument("--steps", type=positive_int, help="training steps (default: of the scale)")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="subset of the networks (default: all of the scale)")
    parser.add_argument("--minutes", type=positive_float,
                        help="time limit: exit status 75 with all work saved; the same command continues")
    parser.add_argument("--workers", type=positive_int, help="processes at once (default: one per core, one on a GPU)")
    parser.add_argument("--work", default="results/experiments", help="folder of trainings and scores")
    parser.add_argument("--output", default="docs/experiments", metavar="DIR",
                        help="folder of JSON and PNG; tables are written to the page DIR.md, if it exists")
    return parser


def select_preset(flags):
    """Return the preset of --data and --scale, changed by --steps and --sizes."""
    preset = PRESETS.get((flags.data, flags.scale))
    if preset is None:
        names = ", ".join(name for data, name in PRESETS if data == flags.data)
        raise ArgumentError(f"for --data {flags.data} there are only {names}. Choose one of them.", scale=flags.scale)
    if flags.steps:
        every = preset.curve_every
        if flags.steps > every and flags.steps % every:
            raise ArgumentError(f"--scale {flags.scale} scores every {every} steps. Use a multiple of that, or fewer.",
                                steps=flags.steps)
        preset = replace(preset, name=f"{preset.name}-{flags.steps}-steps", steps=flags.steps,
                         curve_every=min(every, flags.steps))
    if flags.sizes:
        if unknown := [size for size in flags.sizes if size not in preset.sizes]:
            raise ArgumentError(f"--scale {flags.scale} has {', '.join(preset.sizes)}. Choose of these.", sizes=unknown)
        sizes = {name: size for name, size in preset.sizes.items() if name in flags.sizes}
        network = preset.network if preset.network[0] in sizes else (list(sizes)[-1], preset.network[1])
        preset = replace(preset, name=f"{preset.name}-{'-'.join(sizes)}", sizes=sizes, network=network)
    return preset


def run_study(study):
    """Run a `Study` as its command line says.

    Raises:
        Stopped: At the time limit or on a signal, with all work saved.
        UserError: If the flags do not fit, or a training or a score fails.
    """
    flags, _ = parse_args(build_parser(sys.modules[study.rows.__module__].__doc__))
    is_cpu, log = device_type() == "cpu", functools.partial(print, flush=True)
    tasks, workers = StudyTasks(study, select_preset(flags), flags.work), flags.workers or 1
    if is_cpu and not flags.workers:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    deadline = time.monotonic() + 60 * flags.minutes if flags.minutes else None
    disk_gb = sum(training.disk_bytes for training in tasks.trainings) / 1e9
    log(f"{len(tasks.trainings)} trainings, whose checkpoints take {disk_gb:.3g} GB in {tasks.folder}")
    try:
        for stage in tasks.stages(workers):
            run_tasks(stage, workers, 1 if is_cpu else None, deadline, log)
    except Stopped:
        log(f"stopped, all work is saved; to continue: python -m experiments.{study.name} {shlex.join(sys.argv[1:])}")
        raise
    results = tasks.results()
    path = os.path.join(flags.output, results_name(results))
    write_record(path + ".json", results)
    draw_results(results, flags.output)
    log("\n".join(" | ".join(row) for row in format_table(study, results)))
    for claim, _, here, verdict in study.claims(results):
        log(f"{verdict}: {claim} ({here})")
    log(f"wrote {path}.json and .png")
    write_page(flags.output)


def main(study):
    """Run a study as a command."""
    run_command(functools.partial(run_study, study))
