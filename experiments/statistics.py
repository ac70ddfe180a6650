"""What several seeds say together: means and their errors, correlations, and whether a claim is seen to hold."""

import math
import statistics

# Student's t: 95% of its values lie within so much of 0, with 1, 2, ... degrees of freedom.
STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def mean_std(values):
    """Mean and standard deviation (n - 1) of some numbers; the deviation of a single one is None."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def verdict_lower(low, high):
    """Whether the numbers `low` are seen to be lower than `high`, seed by seed.

    return  "yes", "no" (they are seen to be higher), or "not clear", where 0 lies in the 95% interval of the mean
            difference, by Student's t: the seeds are few
    """
    differences = [b - a for a, b in zip(low, high, strict=True)]
    if len(differences) < 2:
        return "not clear"
    mean, spread = mean_std(differences)
    t = STUDENT_95[min(len(differences) - 1, len(STUDENT_95)) - 1]
    if abs(mean) <= t * spread / math.sqrt(len(differences)):
        return "not clear"
    return "yes" if mean > 0 else "no"


def argmin_mean(settings):
    """Of {setting: values of the seeds} the setting with the lowest mean."""
    return min(settings, key=lambda setting: statistics.fmean(settings[setting]))


def cross_validated_best(settings):
    """The values of the best of several settings, none flattered by having been chosen: of each seed that of the
    setting which is best for the other seeds. (A single seed has none: it chooses for itself, and says nothing anyway.)

    settings  {setting: values of the seeds}
    """
    count = len(next(iter(settings.values())))

    def others(seed):
        return {name: values[:seed] + values[seed + 1:] or values for name, values in settings.items()}

    return [settings[argmin_mean(others(seed))][seed] for seed in range(count)]


def verdict_same_sign(differences):
    """Of the seeds' differences: "yes" where there are several and all are positive, "no" where all are negative."""
    if len(differences) < 2 or not (min(differences) > 0 or max(differences) < 0):
        return "not clear"
    return "yes" if differences[0] > 0 else "no"


def verdict_of_all(verdicts):
    """Of several comparisons: "yes" where all hold, "no" where none does, else "not clear"."""
    found = set(verdicts)
    return found.pop() if len(found) == 1 else "not clear"


def verdict_of_share(comparisons):
    """Of many comparisons, truth values: "yes" where all came out so, "no" where half of them or fewer did."""
    return "yes" if all(comparisons) else "no" if sum(comparisons) <= len(comparisons) / 2 else "not clear"


def correlation(x, y):
    """Pearson's correlation coefficient. raise: ValueError where there is none to speak of."""
    if len(x) < 2 or len(x) != len(y):
        raise ValueError(f"a correlation needs as many numbers of each kind, two at least, not {len(x)} and {len(y)}")
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:
        raise ValueError("one of the two does not vary: there is no correlation") from None


def correlation_interval(r, count):
    """Where the correlation of which r was found in `count` pairs lies with 95%, by Fisher's transformation."""
    if count < 4:
        return -1.0, 1.0
    if abs(r) >= 1:
        return r, r
    centre, width = math.atanh(r), 1.96 / math.sqrt(count - 3)
    return math.tanh(centre - width), math.tanh(centre + width)


def format_mean_std(values, digits=2):
    """Numbers as a table shows them: mean +- standard deviation."""
    mean, spread = mean_std(values)
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
