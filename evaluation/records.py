"""The record beside every score: what was measured, with what, against what; and what differs between two of them."""

import json
import math
import os

from common.errors import UserError
from common.files import atomic_write


def write_record(path, record):
    """Write a record as JSON."""
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())


def free_path(stem, ending):
    """The first of `STEM.ending`, `STEM-2.ending`, ... that is not there."""
    path, number = f"{stem}{ending}", 1
    while os.path.exists(path):
        number += 1
        path = f"{stem}-{number}{ending}"
    return path


def read_record(path):
    """A dictionary. raise: UserError where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no record of a measurement ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is no record of a measurement")
    return record


def try_read(path):
    """A dictionary; an empty one where there is none to read."""
    try:
        return read_record(path)
    except UserError:
        return {}


NO_DIFFERENCE = ("date", "command")  # two measurements never agree in these, and nothing depends on them


def diff_records(one, two, path=""):
    """(field, value of one, value of two) of all that differs; a missing field is None."""
    if isinstance(one, dict) or isinstance(two, dict):
        one, two = ({} if value is None else value for value in (one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        for name in [*one, *(name for name in two if name not in one)]:
            if name not in NO_DIFFERENCE:
                yield from diff_records(one.get(name), two.get(name), f"{path}.{name}" if path else name)
    elif isinstance(one, float) and isinstance(two, float) and math.isclose(one, two, rel_tol=1e-8):
        return  # rounding
    elif one != two:
        yield path, one, two
