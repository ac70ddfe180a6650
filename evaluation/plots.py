"""Pictures of runs, fit to be printed: labelled axes, readable in grey."""

import os
import re

from common.errors import UserError
from common.files import atomic_write
from evaluation.periodic import read_score_table
from evaluation.records import try_read

LOSS_LINE = re.compile(r"\(step=(\d+)\) Train Loss: ([\d.]+)")
SCORES = {"fid": "FID", "frechet_distance": "Frechet distance"}
COLORS = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red")
STYLES = [dict(color=color, linestyle=line) for line in ("-", "--", ":") for color in COLORS]


def plot_runs(folders, path):
    """Draw the loss of each run, and the distance of its samples where it was evaluated, over the training steps.

    folders  experiments' folders, with log.txt and perhaps evaluations.csv
    path     of the picture
    raise    UserError for a folder without a loss, and where the picture cannot be written
    """
    runs = [(folder, losses_in(folder), *distances_in(folder)) for folder in folders]
    titles = sorted({title for _, _, title, _ in runs if title})
    figure, axes = new_figure(1 + len(titles))
    for style, (name, losses, title, distances) in zip(STYLES * len(runs), runs):
        axes[0].plot(*zip(*losses), label=name, linewidth=1.2, **style)
        if title:
            axes[1 + titles.index(title)].plot(*zip(*distances), label=name, marker="o", markersize=3, linewidth=1.2,
                                               **style)
    axes[0].set(xlabel="training steps", ylabel="loss (mean of each log interval)")
    for axis, title in zip(axes[1:], titles):
        axis.set(xlabel="training steps", ylabel=title, yscale="log")
    if len(runs) > 1:
        axes[0].legend(frameon=False, fontsize="small")
    save_figure(figure, path)


def losses_in(folder):
    """[(step, loss)] of a run's log.txt; where a step was logged twice, after a resumption, the last."""
    path = os.path.join(folder, "log.txt")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found = {int(step): float(loss) for step, loss in LOSS_LINE.findall(file.read())}
    except OSError as error:
        raise UserError(f"{folder} is no run of train.py ({error})") from None
    if not found:
        raise UserError(f"{path} holds no loss yet: the run is shorter than its --log-every")
    return sorted(found.items())


def distances_in(folder):
    """What was measured, in a line, and [(step, distance)] of a run's evaluations.csv; (None, []) where there is none.
    """
    rows = read_score_table(os.path.join(folder, "evaluations.csv"))
    space = try_read(os.path.join(folder, "evaluations.json")).get("features", {}).get("space", "?")
    for name, title in SCORES.items():
        if found := sorted((row["step"], row[name]) for row in rows if name in row):
            counts = sorted({row["images"] for row in rows if "images" in row})
            space = "" if name == "fid" else f"{space}, "
            return f"{title} of EMA samples\n({space}{' or '.join(map(str, counts))} images)", found
    return None, []


def new_figure(panels, width=4.2, height=3.2):
    """A matplotlib figure with so many panels side by side, and their axes; no window, no global state."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5, which="both")
        axis.margins(x=0.04)
    return figure, axes


def save_figure(figure, path):
    """Write a figure, in the format of the path's ending. raise: UserError where that cannot be."""
    kind = os.path.splitext(path)[1][1:].lower() or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"cannot write {path}: no picture format has the ending .{kind}; take .png or .pdf")
    with atomic_write(path, sync=False) as file:
        figure.savefig(file, format=kind, dpi=160)
