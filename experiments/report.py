"""Write the tables of docs/experiments.md, and draw the pictures, again from the results that are there.

    python -m experiments.report
"""

import argparse
import importlib
import os
import re

from common.cli import HelpFormatter
from common.errors import UserError, run_command
from common.files import atomic_write
from evaluation.records import read_record
from experiments.job_types import summarize_environment

STUDIES = ("block_types", "scaling", "sampling_steps", "guidance", "averages", "variance")
MARKED = re.compile(r"(<!-- begin (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def name_of(found):
    """The name of a study's results: of JSON, picture and table."""
    return f"{found['study']}-{found['data']}-{found['scale']}"


def page_of(folder):
    return os.path.normpath(folder) + ".md"


def study_of(found):
    return importlib.import_module(f"experiments.{found['study']}")


def all_results(folder):
    """The results in a folder, in the order of the studies; those of one study by their names."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = [read_record(os.path.join(folder, name)) for name in names if name.endswith(".json")]
    return sorted(found, key=lambda results: (STUDIES.index(results["study"]), results["data"], results["scale"]))


def markdown(rows):
    """Rows of texts, headings first, as a table."""
    rows = list(rows)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def section(found, folder):
    """What the page shows of a study's results: how they were made, the table, the picture."""
    name, real, training, study = name_of(found), found["real"], found["training"], study_of(found)
    what = f"{found['data']}, scale {found['scale']}"
    trained = (f"{training['steps']:,} steps of {training['batch_size']} images, learning rate {training['lr']:g}, EMA "
               f"{training['ema_decay']:g}")
    judged = (f"Frechet distances ({found['features']}) of {found['samples']} samples to {found['held_out']} held-out "
              f"images; that of {real['images']} real training images is {real['distance']:.2f}")
    sampled = getattr(study, "SAMPLED", "Samples without guidance, by {}").format(_sampler(found["sampling"]))
    if "curve" in found["rows"][0]:
        sampled += f"; while it trains, {found['curve_samples']} by {_sampler(found['curve_sampling'])}"
    # Older results know the share of a worker, and the study's last start alone.
    minutes = found["work_minutes"] if "work_minutes" in found else found["minutes"] * found["workers"]
    ran = (f"{minutes:.0f} minutes of work, the times of all pieces added up, those that other studies share too: "
           + "; ".join(f"{device}, torch {version}, commit {commit}, {day}"
                       for device, version, commit, day in found.get("made_by") or [summarize_environment(found["made"])]))
    seeds = ", ".join(map(str, found["seeds"]))
    several = len(found["seeds"]) > 1
    spread = f"± and error bars: standard deviation over the seeds {seeds}" if several else f"One seed, {seeds}"
    picture = f"{os.path.basename(os.path.normpath(folder))}/{name}.png"
    return (f"*{what}*: {trained}. {sampled}. {judged}. {spread}. {ran}.\n\n"
            f"{markdown(study.table(found))}\n![{study.TITLE}, {what}]({picture})\n")


def _sampler(steps):
    """--num-sampling-steps, in words."""
    name, count = ("DDIM", steps.removeprefix("ddim")) if str(steps).startswith("ddim") else ("DDPM", steps)
    return f"{name} in {count} steps"


def summary(results):
    """The claims of all studies, and whether they are seen to hold."""
    rows = [("claim", "the paper", "here", "seen?")]
    for found in results:
        where = "" if found["data"] == "digits" else f"{found['data']}, {found['scale']}: "
        rows += [(claim, paper, where + here, f"**{verdict}**")
                 for claim, paper, here, verdict in study_of(found).claims(found)]
    return markdown(rows)


def written(text, folder):
    """A page with what stands between its marks, <!-- begin NAME --> and <!-- end -->, made of the results."""
    results = all_results(folder)
    parts = {name_of(found): section(found, folder) for found in results}
    if results:
        parts["summary"] = summary(results)
    return MARKED.sub(lambda match: match[1] + parts.get(match[2], match[3]) + match[4], text)


def write_page(page, folder):
    """Write the tables of a page again. raise: UserError for results that have no place in it"""
    with open(page, encoding="utf-8") as file:
        text = file.read()
    places = {match[2] for match in MARKED.finditer(text)}
    new = written(text, folder)
    with atomic_write(page) as file:
        file.write(new.encode())
    if lost := [name_of(found) for found in all_results(folder) if name_of(found) not in places]:
        print(f"{page} has no place for {', '.join(lost)}: put <!-- begin {lost[0]} --> and <!-- end --> there")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", default="docs/experiments", metavar="DIR",
                        help="where the results are; the page is DIR.md")
    folder = parser.parse_args().output
    if not (results := all_results(folder)):
        raise UserError(f"--output {folder}: there are no results of a study")
    for found in results:
        study_of(found).draw(found, os.path.join(folder, name_of(found) + ".png"))
    write_page(page_of(folder), folder)
    print(f"wrote {page_of(folder)} and {len(results)} pictures")


if __name__ == "__main__":
    run_command(main)
