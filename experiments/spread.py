"""What several seeds say together: means and their errors, correlations, and whether a claim is seen to hold."""
import math
import statistics

CLEAR = 2  # a difference is seen where it is more than so many times its standard error


def mean_spread(values):
    """Mean and standard deviation (n - 1) of some numbers; the deviation of a single one is None."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def standard_error(values):
    """Of their mean; None for a single one."""
    spread = mean_spread(values)[1]
    return None if spread is None else spread / math.sqrt(len(values))


def seen_lower(low, high):
    """Whether the numbers `low` are seen to have a lower mean than `high`: "yes", "no" (they are seen to have a higher
    one), or "not clear", where the means differ by less than twice the standard error of their difference.
    """
    errors = standard_error(low), standard_error(high)
    if None in errors:
        return "not clear"
    difference = statistics.fmean(high) - statistics.fmean(low)
    error = math.hypot(*errors)
    return "yes" if difference > CLEAR * error else "no" if -difference > CLEAR * error else "not clear"


def all_of(verdicts):
    """Of several comparisons: "yes" where all hold, "no" where none does, else "not clear"."""
    found = set(verdicts)
    return found.pop() if len(found) == 1 else "not clear"


def share_of(comparisons):
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


def plus_minus(values, digits=2):
    """Numbers as a table shows them: mean +- standard deviation."""
    mean, spread = mean_spread(values)
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
