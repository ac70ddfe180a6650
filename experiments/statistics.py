"""What several seeds say: means and their errors, and whether a claim is seen to hold."""
import math
import statistics

# Student's t: 95% of its values lie within plus or minus this, with 1, 2, ... degrees of freedom.
STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def mean_std(values):
    """Return mean and standard deviation (n - 1), which is 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0


def format_mean_std(values):
    """Return "mean ± standard deviation", or a single value."""
    mean, std = mean_std(values)
    return f"{mean:.2f}" + (f" ± {std:.2f}" if len(values) > 1 else "")


def format_percent(values):
    """Return the mean of fractions as a percentage."""
    return f"{statistics.fmean(values):.1%}"


def verdict_lower(low, high):
    """Return whether the values `low` are seen to be lower than `high`, seed by seed.

    Returns:
        str: "yes", "no" (they are seen to be higher), or "not clear": 0 lies in the 95% interval of the mean difference
        by Student's t, because the seeds are few.
    """
    differences = [b - a for a, b in zip(low, high, strict=True)]
    mean, std = mean_std(differences)
    t = STUDENT_95[min(len(differences) - 1, len(STUDENT_95)) - 1]
    if len(differences) < 2 or abs(mean) <= t * std / math.sqrt(len(differences)):
        return "not clear"
    return "yes" if mean > 0 else "no"


def argmin_mean(settings):
    """Return the setting with the lowest mean of {setting: values of the seeds}."""
    return min(settings, key=lambda setting: statistics.fmean(settings[setting]))


def cross_validated_best(settings):
    """Return each seed's value of the setting that is best for the other seeds, so that being chosen flatters none.

    Args:
        settings (dict): {setting: values of the seeds}. A single seed chooses for itself.
    """
    def without(seed):
        return {name: values[:seed] + values[seed + 1:] or values for name, values in settings.items()}

    count = len(next(iter(settings.values())))
    return [settings[argmin_mean(without(seed))][seed] for seed in range(count)]


def verdict_of_share(comparisons):
    """Return "yes" if all of many comparisons hold, "no" if at most half of them do, else "not clear"."""
    return "yes" if all(comparisons) else "no" if sum(comparisons) <= len(comparisons) / 2 else "not clear"


def correlation_interval(r, count):
    """Return the 95% interval of a correlation r of `count` pairs, by Fisher's transformation."""
    if count < 4:
        return -1.0, 1.0
    if abs(r) >= 1:
        return r, r
    center, width = math.atanh(r), 1.96 / math.sqrt(count - 3)
    return math.tanh(center - width), math.tanh(center + width)
