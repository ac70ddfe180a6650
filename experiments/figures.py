"""How the studies' pictures look: labelled, with error bars, told apart by markers and lines also in grey."""

from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from evaluation.plots import new_figure, save_figure
from experiments.statistics import mean_std

__all__ = ["curve", "finish", "log_axes", "new_figure", "save_figure"]
# From dark to light, so that the order is seen in grey too.
COLORS = ("#000000", "#3b3a8c", "#1f7a8c", "#2e9e6b", "#c77b30", "#b0a030")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MANY = 500  # of a longer logarithmic axis powers of ten are named alone
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


def curve(axis, points, label, number, line=True):
    """Draw {x: values of the seeds} as means with error bars of one standard deviation; `number` chooses the style."""
    means = [mean_std(values) for values in points.values()]
    errors = [spread or 0 for _, spread in means]
    axis.errorbar(list(points), [mean for mean, _ in means], yerr=errors if any(errors) else None, label=label,
                  color=COLORS[number % len(COLORS)], marker=MARKERS[number % len(MARKERS)],
                  linestyle=LINES[number % len(LINES)] if line else "none", markersize=4, linewidth=1.2, capsize=2,
                  elinewidth=0.8, markerfacecolor="white" if number % 2 else None)


def log_axes(axis, which="y"):
    """Logarithmic axes with plain numbers at 1, 2, 5, 10, ...; which: "x", "y" or "xy". After what is drawn in them."""
    for name in which:
        axis.set(**{f"{name}scale": "log"})
        ticks = getattr(axis, f"{name}axis")
        low, high = ticks.get_view_interval()
        ticks.set_major_locator(LogLocator(subs=(1,) if high > MANY * low else (1, 2, 5), numticks=12))
        ticks.set_major_formatter(FormatStrFormatter("%g"))
        ticks.set_minor_formatter(NullFormatter())


def finish(figure, axis, path, title=None, **more):
    """Legend on `axis`, and write the picture."""
    axis.legend(frameon=False, fontsize="small", title=title, title_fontsize="small", **more)
    save_figure(figure, path)
