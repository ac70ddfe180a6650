"""Write the results of `python -m benchmarks.gpu` into docs/performance.md and README.md, between their marks.

    python -m benchmarks.gpu.tables --results docs/measurements/gpu

A part without a result says that it is not yet measured.
"""
import argparse
import os
import re

from benchmarks.gpu.rows import PARTS, XL, all_rows
from benchmarks.gpu.runner import RESULTS
from common.cli import HelpFormatter, parse_args
from common.errors import UserError, run_command
from common.files import atomic_write
from evaluation.records import read_record

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEFAULT_RESULTS = os.path.join("docs", "measurements", "gpu")
PAGES = ("docs/performance.md", "README.md")
NOT_MEASURED = "not yet measured on a GPU"
MARKS = re.compile(r"(<!-- begin gpu-(\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main():
    """Write the tables of all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--results", default=DEFAULT_RESULTS, metavar="DIR", help="folder of results.json")
    flags, _ = parse_args(parser)
    rows = read_rows(flags.results)
    for page in PAGES:
        path = os.path.join(ROOT, page)
        with open(path, encoding="utf-8") as file:
            text = file.read()
        with atomic_write(path) as file:
            file.write(fill_page(text, rows).encode())
        print(f"wrote {len(MARKS.findall(text))} tables of {page}, from {len(rows)} rows")


def read_rows(folder):
    """Return {name: result} in a folder; empty if nothing was measured yet.

    Raises:
        UserError: If the results were made on a CPU at a tiny size, which measures nothing.
    """
    path = os.path.join(folder, RESULTS)
    rows = read_record(path).get("rows", {}) if os.path.exists(path) else {}
    if any(row["made"].get("device", "").startswith("cpu") for row in rows.values()):
        raise UserError(f"{path} holds results of a CPU, whose rows are tiny: they are no measurements. Run "
                        "`python -m benchmarks.gpu` on a GPU")
    return rows


def fill_page(text, rows):
    """Return a page with the results between its marks <!-- begin gpu-NAME --> and <!-- end -->."""
    tables = {part: format_part(part, rows) for part in PARTS} | dict(summary=format_summary(rows))
    return MARKS.sub(lambda match: match[1] + tables[match[2]] + match[4], text)


def format_part(part, rows):
    """Return the table of a part, and what it was made with."""
    order = [row.name for row in all_rows()]
    names = sorted((name for name, row in rows.items() if row["part"] == part),
                   key=lambda name: order.index(name) if name in order else len(order))
    if not names:
        return f"*{NOT_MEASURED}*\n"
    chosen = {name: rows[name] for name in names}
    table = format_profiles(chosen) if part == "profile" else format_table(COLUMNS[part], chosen, rows)
    return f"{table}\n{format_origin(chosen)}"


def format_origin(rows):
    """Return cards, versions, commits and dates of rows."""
    made = [row["made"] for row in rows.values() if row["made"]]
    origins = {(each["device"], each["versions"]["torch"], each.get("cuda"), each.get("driver"), each["commit"],
                each["date"][:10]) for each in made}
    return "; ".join(f"{device}, torch {version}, CUDA {cuda}, driver {driver}, commit {commit}, {day}"
                     for device, version, cuda, driver, commit, day in sorted(origins, key=str)) + ".\n"


def _ratio_to_published(name, row, rows):
    """Return how many times as fast a row is as the published code with the same network and batch."""
    base = baseline_of(name, rows)
    return f"{rows[base]['seconds'] / row['seconds']:.2f}" if base else ""


def baseline_of(name, rows):
    """Return the name of the row of the published code to compare a row with, or None if that has no result."""
    if name.startswith("XL/2 ") and "steps, batch 32" in name and "ddim" not in name and "interval" not in name:
        base = "XL/2 published loop, TF32, 250 steps, batch 32"
    else:
        base = f"{name.split(' ')[0]} published recipe, TF32, batch {name.rsplit(' ', 1)[-1]}"
    return base if rows.get(base, {}).get("status") == "ok" else None


def _number(key, template):
    return lambda name, row, rows: template.format(row[key]) if row.get(key) is not None else ""


def _window(name, row, rows):
    return f"{row['seconds']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"


def _best_ratio(name, row, rows):
    best = rows.get("XL/2 --fast, batch 128", {}).get("seconds")
    return f"{best / row['seconds']:.2f}" if best and "seconds" in row else ""


def _measured_values(name, row, rows):
    values = {key: value for key, value in row.items() if isinstance(value, (int, float, str))
              and key not in ("part", "status", "reason", "duration")}
    return ", ".join(f"{key.replace('_', ' ')} {value:.3g}" if isinstance(value, float)
                     else f"{key.replace('_', ' ')} {value}" for key, value in values.items())


# Columns of a part: {heading: (name, row, all rows) -> text}.
COLUMNS = {
    "correctness": {"result": lambda name, row, rows: row["status"], "measured": _measured_values},
    "training": {"images/s": _number("images_per_second", "{:.0f}"), "MFU": _number("mfu", "{:.1%}"),
                 "s per step": _window, "peak GB": _number("memory_gb", "{:.1f}"),
                 "times as fast as published": _ratio_to_published,
                 "start and compilation, s": _number("warm_up_seconds", "{:.0f}")},
    "sampling": {"images/s": _number("images_per_second", "{:.2f}"), "s per batch": _window,
                 "ms per step": _number("milliseconds_per_step", "{:.1f}"),
                 "peak GB": _number("memory_gb", "{:.1f}"), "times as fast as published": _ratio_to_published},
    "options": {"images/s": _number("images_per_second", "{:.0f}"), "MFU": _number("mfu", "{:.1%}"),
                "peak GB": _number("memory_gb", "{:.1f}"), "times as fast as `--fast`": _best_ratio,
                "start and compilation, s": _number("warm_up_seconds", "{:.0f}"),
                "ms": _number("milliseconds", "{:.2f}")},
    "memory": {"predicted GB": _number("predicted_gb", "{:.1f}"), "measured GB": _number("measured_gb", "{:.1f}"),
               "measured / predicted": _number("ratio", "{:.2f}"),
               "predicted batch": _number("predicted_batch", "{}"), "largest batch": _number("largest_batch", "{}")},
    "loading": {"items/s": _number("items_per_second", "{:,.0f}"),
                "lowest": _number("lowest", "{:,.0f}"), "highest": _number("highest", "{:,.0f}")},
}


def format_table(columns, chosen, rows):
    """Return the table of chosen rows with the columns of their part; a row without a result shows its reason."""
    lines = [["", *columns]]
    for name, row in chosen.items():
        if row["status"] == "ok":
            lines.append([name, *(cell(name, row, rows) for cell in columns.values())])
        elif row["status"] == "failed":
            lines.append([name, f"**failed**: {row['reason']}", _measured_values(name, row, rows)])
        else:
            lines.append([name, f"{row['status']}: {row['reason']}"])
    return _markdown(lines)


def format_profiles(chosen):
    """Return one table of milliseconds by class of kernel, a column per row, and the longest kernels of each."""
    good = {name: row for name, row in chosen.items() if row["status"] == "ok"}
    classes = list(dict.fromkeys(kind for row in good.values() for kind in row["milliseconds"]))
    lines = [["ms per step", *good], ["in all", *(f"{row['total_ms']:.2f}" for row in good.values())]]
    lines += [[kind, *(f"{row['milliseconds'].get(kind, 0):.2f}" for row in good.values())] for kind in classes]
    text = _markdown(lines) if good else ""
    for name, row in good.items():
        kernels = "; ".join(f"`{kernel}` {value:.2f}" for kernel, value in row["kernels"][:5])
        text += f"\nLongest kernels of {name}, ms: {kernels}.\n"
    for name in chosen.keys() - good.keys():
        text += f"\n{name}: {chosen[name]['status']} ({chosen[name]['reason']}).\n"
    return text


def format_summary(rows):
    """Return the table of the README: training and sampling of XL/2 against the published code."""
    training = [f"XL/2 --fast, batch {batch}" for batch in (256, 128, 64, 32)]
    training = [name for name in training if rows.get(name, {}).get("status") == "ok"]
    best = max(training, key=lambda name: rows[name]["images_per_second"], default=None)
    pair = next((name for name in training if baseline_of(name, rows)), None)
    sampling = "XL/2 --fast, 250 steps, batch 32"
    cells = {f"training {XL} at 256x256 (`--fast`)": NOT_MEASURED, f"sampling {XL}, 250 guided steps": NOT_MEASURED}
    first, second = cells
    if best:
        row = rows[best]
        mfu = f", MFU {row['mfu']:.0%}" if row.get("mfu") else ""
        times = f", {_ratio_to_published(pair, rows[pair], rows)} times the published code" if pair else ""
        cells[first] = f"{row['images_per_second']:.0f} images/s{mfu}{times}"
    if rows.get(sampling, {}).get("status") == "ok":
        times = _ratio_to_published(sampling, rows[sampling], rows)
        cells[second] = (f"{rows[sampling]['images_per_second']:.2f} images/s"
                         + (f", {times} times the published loop" if times else ""))
    card = next((rows[name]["made"]["device"] for name in (best, sampling) if name in rows), "one GPU")
    return _markdown([["", card], *([name, text] for name, text in cells.items())])


def _markdown(lines):
    width = max(map(len, lines))
    rows = [f"| {' | '.join([*line, *[''] * (width - len(line))])} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * width, *rows[1:]]) + "\n"


if __name__ == "__main__":
    run_command(main)
