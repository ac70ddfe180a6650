"""Figures of training runs, ready for print: labeled axes, readable in gray."""
import os
import re

from common.errors import UserError
from common.files import atomic_write
from evaluation.periodic import read_score_table
from evaluation.records import try_read

LOSS_LINE = re.compile(r"\(step=(\d+)\) Train Loss: ([\d.]+)")
SCORE_TITLES = {"fid": "FID", "frechet_distance": "Frechet distance"}
COLORS = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red")
STYLES = [dict(color=color, linestyle=line) for line in ("-", "--", ":") for color in COLORS]


def plot_runs(folders, path):
    """Plot the loss of each run, and the distance of its samples if it was evaluated, over the training steps.

    Run folders have a log.txt and perhaps an evaluations.csv.

    Raises:
        UserError: If a folder has no loss, or the figure cannot be written.
    """
    runs = [(folder, read_losses(folder), *read_distances(folder)) for folder in folders]
    titles = sorted({title for _, _, title, _ in runs if title})
    figure, axes = new_figure(1 + len(titles))
    for style, (name, losses, title, distances) in zip(STYLES * len(runs), runs):
        axes[0].plot(*zip(*losses), label=name, linewidth=1.2, **style)
        if title:
            axis = axes[1 + titles.index(title)]
            axis.plot(*zip(*distances), label=name, marker="o", markersize=3, linewidth=1.2, **style)
    axes[0].set(xlabel="training steps", ylabel="loss (mean of each log interval)")
    for axis, title in zip(axes[1:], titles):
        axis.set(xlabel="training steps", ylabel=title, yscale="log")
    if len(runs) > 1:
        axes[0].legend(frameon=False, fontsize="small")
    save_figure(figure, path)


def read_losses(folder):
    """Read [(step, loss)] from log.txt of a run; of a step that was repeated after resuming, the last."""
    path = os.path.join(folder, "log.txt")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            losses = {int(step): float(loss) for step, loss in LOSS_LINE.findall(file.read())}
    except OSError as error:
        raise UserError(f"{folder} is not a run of train.py ({error})") from None
    if not losses:
        raise UserError(f"{path} holds no loss yet: the run is shorter than its --log-every")
    return sorted(losses.items())


def read_distances(folder):
    """Read the title of the distance and [(step, distance)] from evaluations.csv of a run; (None, []) if absent."""
    rows = read_score_table(os.path.join(folder, "evaluations.csv"))
    space = try_read(os.path.join(folder, "evaluations.json")).get("features", {}).get("space", "?")
    for name, title in SCORE_TITLES.items():
        distances = sorted((row["step"], row[name]) for row in rows if name in row)
        if distances:
            counts = sorted({row["images"] for row in rows if "images" in row})
            prefix = "" if name == "fid" else f"{space}, "
            return f"{title} of EMA samples\n({prefix}{' or '.join(map(str, counts))} images)", distances
    return None, []


def new_figure(panels, width=4.2, height=3.2):
    """Return a matplotlib figure with panels side by side, and their axes; sizes of a panel in inches.

    There is no window and no global state.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.5, which="both")
        axis.margins(x=0.04)
    return figure, axes


def save_figure(figure, path, dpi=160):
    """Write a figure in the format of the path's extension; raise a `UserError` if that is not possible."""
    picture_format = os.path.splitext(path)[1][1:].lower() or "png"
    if picture_format not in figure.canvas.get_supported_filetypes():
        raise UserError(f"cannot write {path}: not a picture format: .{picture_format}. Use .png or .pdf")
    with atomic_write(path, sync=False) as file:
        figure.savefig(file, format=picture_format, dpi=dpi)
