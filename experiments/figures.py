"""How the studies' pictures look: labeled, with error bars, distinct by markers and lines also in gray."""
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from experiments.statistics import mean_std

COLORS = ("#000000", "#3b3a8c", "#1f7a8c", "#2e9e6b", "#c77b30", "#b0a030")  # from dark to light
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))


def draw_lines(axis, lines, xlabel, ylabel, log="", xticks=None):
    """Draw {label: {x: values of the seeds}} as means with error bars of one standard deviation.

    `log` names logarithmic axes ("y", "xy"); `xticks` are {x: label}.
    """
    for i, (label, points) in enumerate(lines.items()):
        means, stds = zip(*map(mean_std, points.values()))
        errors = [std or 0 for std in stds]
        axis.errorbar(list(points), means, yerr=errors if any(errors) else None, label=label,
                      color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)],
                      linestyle=LINES[i % len(LINES)], markerfacecolor="white" if i % 2 else None,
                      markersize=4, linewidth=1.2, capsize=2, elinewidth=0.8)
    set_log_axes(axis, log)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if xticks:
        axis.set_xticks(list(xticks), list(xticks.values()))
        axis.minorticks_off()


def set_log_axes(axis, names):
    """Make axes logarithmic, with plain numbers at 1, 2, 5, 10, ..., or at powers of ten only if the axis is long."""
    for name in names:
        axis.set(**{f"{name}scale": "log"})
        ticks = getattr(axis, f"{name}axis")
        low, high = ticks.get_view_interval()
        ticks.set_major_locator(LogLocator(subs=(1,) if high > 500 * low else (1, 2, 5), numticks=12))
        ticks.set_major_formatter(FormatStrFormatter("%g"))
        ticks.set_minor_formatter(NullFormatter())


def add_legend(axis, title=None):
    """Add a legend without a frame."""
    axis.legend(frameon=False, fontsize="small", title=title, title_fontsize="small")


def distance_label(results, count="samples"):
    """Return the label of an axis of distances; `count` names the field with the number of samples."""
    return f"Frechet distance ({results['features']}, {results[count]} samples)"
