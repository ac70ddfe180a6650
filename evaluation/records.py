"""Records of measurements: JSON files with a result and all that it depends on, and the differences of two."""
import json
import math
import os

from common import distributed
from common.errors import ArgumentError, UserError
from common.files import atomic_write, check_writable


def write_record(path, record):
    """Write a record (dict) as JSON."""
    with atomic_write(path) as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())


def free_path(stem, extension):
    """Return the first of STEM.json, STEM-2.json, ... that does not exist, for the extension ".json"."""
    path, number = f"{stem}{extension}", 1
    while os.path.exists(path):
        number += 1
        path = f"{stem}-{number}{extension}"
    return path


def record_path(output, source, suffix):
    """Return the path of a record: `output`, or beside its source: NAME.scores.json, for the suffix "scores"."""
    if os.path.basename(os.path.normpath(source)) in (".", ".."):
        source = os.path.abspath(source)
    stem = os.path.splitext(source)[0] if os.path.isfile(source) else os.path.normpath(source)
    return output or free_path(f"{stem}.{suffix}", ".json")


def check_output(output, extension, *inputs, default=None):
    """Raise an `ArgumentError` unless the file `output` has this extension and can be written.

    Args:
        output (str): The value of --output, or None.
        extension (str): What its name must end in, such as ".json".
        *inputs (str): Files that it must not replace.
        default (str): The file that is written if `output` is None.
    """
    if output is not None and not output.lower().endswith(extension):
        raise ArgumentError(f"the name must end in {extension}", output=output)
    if output is not None and any(_is_same_file(output, other) for other in inputs):
        raise ArgumentError("this would overwrite an input. Choose another name", output=output)
    path = output or default
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ArgumentError(f"there is no folder {folder}", output=output)
    if distributed.is_rank0():  # which writes it
        check_writable(path, output=output)


def _is_same_file(one, two):
    if os.path.exists(one) and os.path.exists(two):
        return os.path.samefile(one, two)
    return os.path.abspath(one) == os.path.abspath(two)


def read_record(path):
    """Read a record (dict); raise a `UserError` if the file is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a record of a measurement ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is not a record of a measurement")
    return record


def try_read(path):
    """Read a record; an empty dict if the file is not one."""
    try:
        return read_record(path)
    except UserError:
        return {}


IGNORED_FIELDS = ("date", "command")  # these always differ, and no result depends on them


def diff_records(one, two, path=""):
    """Yield (field, value of one, value of two) for every difference; a missing field is None."""
    if isinstance(one, dict) or isinstance(two, dict):
        one, two = ({} if value is None else value for value in (one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        for name in dict.fromkeys([*one, *two]):
            if name not in IGNORED_FIELDS:
                yield from diff_records(one.get(name), two.get(name), f"{path}.{name}" if path else name)
    elif isinstance(one, float) and isinstance(two, float) and math.isclose(one, two, rel_tol=1e-8):
        return  # rounding
    elif one != two:
        yield path, one, two
