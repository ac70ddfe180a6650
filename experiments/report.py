"""Write the tables of docs/experiments.md and draw its pictures from the stored results."""
import argparse
import importlib
import os
import re

from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from common.cli import HelpFormatter, parse_args
from common.errors import ArgumentError, run_command
from common.files import atomic_write
from evaluation.plots import new_figure, save_figure
from evaluation.records import read_record
from experiments.statistics import format_mean_std, mean_std

STUDIES = ("block_types", "scaling", "sampling_steps", "guidance", "ema_decay", "variance", "solvers")
_FORMER_NAMES = {"averages": "ema_decay"}
_MARKS = re.compile(r"(<!-- begin (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
COLORS = ("#000000", "#3b3a8c", "#1f7a8c", "#2e9e6b", "#c77b30", "#b0a030")  # from dark to light
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


def results_name(results):
    """Return the name of results: that of their JSON, picture and place on the page."""
    return f"{results['study']}-{results['data']}-{results['scale']}"


def find_study(results):
    """Return the `Study` whose results these are."""
    return importlib.import_module(f"experiments.{results['study']}").STUDY


def read_all_results(folder):
    """Return the results in a folder, in the order of the studies."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    all_results = [read_record(os.path.join(folder, name)) for name in names if name.endswith(".json")]
    for results in all_results:
        results["study"] = _FORMER_NAMES.get(results["study"], results["study"])
    return sorted(all_results, key=lambda results: (STUDIES.index(results["study"]), results["data"], results["scale"]))


# ---------------------------------------------------------------- pictures

def draw_results(results, folder):
    """Draw the picture of results."""
    study = find_study(results)
    panels = list(study.panels(results))
    figure, axes = new_figure(len(panels), width=5.4 if len(panels) == 1 else 4.2, height=3.6)
    for axis, panel in zip(axes, panels):
        draw_panel(axis, results, **panel)
    save_figure(figure, os.path.join(folder, results_name(results) + ".png"))


def draw_panel(axis, results, lines, xlabel, ylabel=None, log="", xticks=None, samples="samples", legend=None):
    """Draw {label: {x: values of the seeds}} as means with error bars, distinct by markers and lines also in gray.

    `log` names logarithmic axes ("y", "xy"); `xticks` are {x: label}; without `ylabel` y is the distance of as many
    samples as the field `samples` says; `legend` is its title, without which there is no legend.
    """
    for i, (label, points) in enumerate(lines.items()):
        means, stds = zip(*map(mean_std, points.values()))
        axis.errorbar(list(points), means, yerr=stds if any(stds) else None, label=label,
                      color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)],
                      linestyle=LINES[i % len(LINES)], markerfacecolor="white" if i % 2 else None,
                      markersize=4, linewidth=1.2, capsize=2, elinewidth=0.8)
    for name in log:  # plain numbers at 1, 2, 5, 10, ..., or at powers of ten only if the axis is long
        axis.set(**{f"{name}scale": "log"})
        ticks = getattr(axis, f"{name}axis")
        low, high = ticks.get_view_interval()
        ticks.set_major_locator(LogLocator(subs=(1,) if high > 500 * low else (1, 2, 5), numticks=12))
        ticks.set_major_formatter(FormatStrFormatter("%g"))
        ticks.set_minor_formatter(NullFormatter())
    if xticks:
        axis.set_xticks(list(xticks), list(xticks.values()))
        axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel or f"Frechet distance ({results['features']}, {results[samples]} samples)")
    if legend is not None:
        axis.legend(frameon=False, fontsize="small", title=legend, title_fontsize="small")


# ---------------------------------------------------------------- tables

def format_table(study, results):
    """Return rows of strings, headings first."""
    rows, columns = study.columns(results) if callable(study.columns) else (results["rows"], study.columns)
    all_x = [x for x, _ in rows[0]["distance"]] if study.x_heading else []
    table = [[heading.format(**results) for heading in columns] + [study.x_heading(x) for x in all_x]]
    for row in rows:
        values = dict(row["distance"]) if study.x_heading else {}
        table.append([cell(row) for cell in columns.values()]
                     + [format_mean_std(values[x]) if x in values else "" for x in all_x])
    return table


def format_markdown(rows):
    """Return rows of strings, headings first, as a table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def format_section(results, folder):
    """Return what the page shows of a study: how its results were made, the table, the picture."""
    real, training, study, seeds = results["real"], results["training"], find_study(results), results["seeds"]
    title = f"{results['data']}, scale {results['scale']}"
    sampled = study.sampled.format(_format_sampler(results["sampling"]))
    if "curve" in results["rows"][0]:
        sampled += f"; during training, {results['curve_samples']} by {_format_sampler(results['curve_sampling'])}"
    # Older results have the share of a worker, and the environment of the last start only.
    minutes = results["work_minutes"] if "work_minutes" in results else results["minutes"] * results["workers"]
    environments = "; ".join(f"{device}, torch {version}, commit {commit}, {day}" for device, version, commit, day
                             in results.get("made_by") or [summarize_environment(results["made"])])
    errors = f"± and error bars: standard deviation over the seeds {', '.join(map(str, seeds))}"
    picture = f"{os.path.basename(os.path.normpath(folder))}/{results_name(results)}.png"
    return (f"*{title}*: {training['steps']:,} steps of {training['batch_size']} images, learning rate "
            f"{training['lr']:g}, EMA {training['ema_decay']:g}. {sampled}. Frechet distances ({results['features']}) "
            f"of {results['samples']} samples to {results['held_out']} held-out images; that of {real['images']} real "
            f"training images is {real['distance']:.2f}. {errors if len(seeds) > 1 else f'One seed, {seeds[0]}'}. "
            f"{minutes:.0f} minutes of work, the sum over all trainings and scores, shared ones included: "
            f"{environments}.\n\n{format_markdown(format_table(study, results))}\n"
            f"![{study.title}, {title}]({picture})\n")


def _format_sampler(steps):
    count = str(steps).removeprefix("ddim")
    return f"{'DDIM' if count != str(steps) else 'DDPM'} in {count} steps"


def summarize_environment(record):
    """Return (device, version of torch, commit, day) of a record of `collect_environment`."""
    return record["device"], record["versions"]["torch"], record["commit"] or "unknown", record["date"][:10]


def format_summary(all_results):
    """Return the table of the claims of all studies, and whether they are seen to hold."""
    rows = [("claim", "the paper", "here", "seen?")]
    for results in all_results:
        prefix = "" if results["data"] == "digits" else f"{results['data']}, {results['scale']}: "
        rows += [(claim, paper, prefix + here, f"**{verdict}**")
                 for claim, paper, here, verdict in find_study(results).claims(results)]
    return format_markdown(rows)


def fill_page(text, folder):
    """Return a page with the results between its marks <!-- begin NAME --> and <!-- end -->."""
    all_results = read_all_results(folder)
    parts = {results_name(results): format_section(results, folder) for results in all_results}
    if all_results:
        parts["summary"] = format_summary(all_results)
    return _MARKS.sub(lambda match: match[1] + parts.get(match[2], match[3]) + match[4], text)


def write_page(folder):
    """Fill the page FOLDER.md, if there is one; print which results have no place on it."""
    page = os.path.normpath(folder) + ".md"
    if not os.path.exists(page):
        return
    with open(page, encoding="utf-8") as file:
        text = file.read()
    with atomic_write(page) as file:
        file.write(fill_page(text, folder).encode())
    print(f"wrote the tables of {page}")
    for name in map(results_name, read_all_results(folder)):
        if f"<!-- begin {name} -->" not in text:
            print(f"{page} has no place for {name}: put <!-- begin {name} --> and <!-- end --> there")


def main():
    """Draw all pictures and write all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", default="docs/experiments", metavar="DIR",
                        help="folder of the results; the page is DIR.md")
    flags, _ = parse_args(parser)
    all_results = read_all_results(flags.output)
    if not all_results:
        raise ArgumentError("there are no results of a study. Run one first.", output=flags.output)
    for results in all_results:
        draw_results(results, flags.output)
    write_page(flags.output)


if __name__ == "__main__":
    run_command(main)
