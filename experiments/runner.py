"""What all studies share: flags, running the pieces, and keeping what was found as JSON, PNG and tables."""

import argparse
import functools
import os
import shlex
import sys
import time
from dataclasses import replace

import torch

from common.cli import HelpFormatter, positive_float, positive_int
from common.errors import Stopped, UserError
from common.provenance import collect_environment
from evaluation.records import write_record
from experiments.job_types import StudyContext
from experiments.jobs import run_tasks
from experiments.presets import PRESETS, STUDY_DATA
from experiments.report import name_of, page_of, write_page


def build_parser(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--data", choices=STUDY_DATA, default="digits", help="digits: two CPU cores; fractals: a GPU")
    parser.add_argument("--scale", choices=sorted({name for _, name in PRESETS}), default="miniature",
                        help="how large: see experiments/scales.py; paper: the paper's own networks, on the fractals")
    parser.add_argument("--steps", type=positive_int, help="train for so many steps; default: as the scale says")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="only these networks; default: those of the scale")
    parser.add_argument("--minutes", type=positive_float, help="end after so many, with all saved (exit status 75); "
                                                               "the same command goes on")
    parser.add_argument("--workers", type=positive_int, help="pieces at once; default: one a core, or one on a GPU")
    parser.add_argument("--work", default="results/experiments", help="where trainings and scores are kept")
    parser.add_argument("--output", default="docs/experiments", metavar="DIR",
                        help="where JSON and PNG go; the tables go to the page DIR.md, if there is one")
    return parser


def run_study(study):
    """Run a study, a module of this package, from its command line. Each has

    TITLE             of its picture and table
    SAMPLED           how its samples are made, where that is not the scale's way without guidance; {}: the scale's way
    scores(setup)     {key: Score}; what is trained follows from them
    results(setup, scores)  what was found, when all is done: a dictionary of plain values
    table(results)    rows of texts, the first of which are the headings
    draw(results, path)
    claims(results)   (claim, the paper, what is seen here, verdict) each
    """
    flags = build_parser(study.__doc__).parse_args()
    is_cpu = not torch.accelerator.is_available()
    setup = open_setup(flags, flags.workers or (_cores() if is_cpu else 1))
    name = study.__spec__.name.removeprefix("experiments.")
    deadline = time.monotonic() + 60 * flags.minutes if flags.minutes else None
    scores, say = study.scores(setup), functools.partial(print, flush=True)
    stages = setup.stages(name, list(scores.values()))
    trainings = stages[-2]
    kept = sum(piece.disk for piece in trainings) / 1e9
    say(f"{len(trainings)} trainings, of which {kept:.3g} GB are kept in {setup.folder}")
    try:
        for pieces in stages:
            run_tasks(pieces, setup.workers, 1 if is_cpu else None, deadline, say)
    except Stopped:
        print(f"stopped, all is saved; to go on: python -m experiments.{name} {shlex.join(sys.argv[1:])}", flush=True)
        raise
    seconds = sum(piece.seconds() for pieces in stages for piece in pieces)
    found = dict(study=name, data=setup.images.name, scale=setup.scale.name, steps=setup.scale.steps,
                 work_minutes=round(seconds / 60, 1),
                 made=collect_environment("cpu" if is_cpu else torch.accelerator.current_accelerator().type))
    found |= study.results(setup, scores)
    write_record(os.path.join(flags.output, name_of(found) + ".json"), found)
    study.draw(found, os.path.join(flags.output, name_of(found) + ".png"))
    print("\n".join(" | ".join(row) for row in study.table(found)))
    for claim, _, here, verdict in study.claims(found):
        print(f"{verdict}: {claim} ({here})")
    print(f"wrote {flags.output}/{name_of(found)}.json and .png")
    if os.path.exists(page := page_of(flags.output)):
        write_page(page, flags.output)
        print(f"wrote the tables of {page}")


def open_setup(flags, workers):
    """The `StudyContext` that the flags say. raise: UserError"""
    scale = PRESETS.get((flags.data, flags.scale))
    if scale is None:
        there = ", ".join(name for data, name in PRESETS if data == flags.data)
        raise UserError(f"--scale {flags.scale}: for --data {flags.data} there are {there}")
    if flags.steps:
        if flags.steps > scale.curve_every and flags.steps % scale.curve_every:
            raise UserError(f"--steps {flags.steps}: --scale {flags.scale} measures every {scale.curve_every} steps; "
                            "pass a multiple of that, or fewer")
        scale = replace(scale, name=f"{scale.name}-{flags.steps}-steps", steps=flags.steps,
                        curve_every=min(scale.curve_every, flags.steps))
    if flags.sizes:
        if unknown := set(flags.sizes) - set(scale.sizes):
            raise UserError(f"--sizes {' '.join(sorted(unknown))}: --scale {flags.scale} has {', '.join(scale.sizes)}")
        sizes = {name: size for name, size in scale.sizes.items() if name in flags.sizes}
        one = scale.one if scale.one[0] in sizes else (list(sizes)[-1], scale.one[1])
        scale = replace(scale, name=f"{scale.name}-{'-'.join(sizes)}", sizes=sizes, one=one)
    return StudyContext(STUDY_DATA[flags.data], scale, flags.work, workers)


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
