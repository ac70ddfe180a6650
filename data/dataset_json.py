"""Labels of a dataset.json, which the tools of StyleGAN and EDM write beside numbered folders of images."""
import json
import os

from common.errors import ArgumentError

LABELS_FILE = "dataset.json"
MAX_LABEL = 1_000_000


def read_labels(root):
    """Read the labels of a data set's dataset.json: {"labels": [["00000/img00000000.png", 7], ...]}.

    Returns:
        dict[str, int]: The class number of each file; None if the file has no labels.

    Raises:
        ArgumentError: If the file is damaged, or its labels are not class numbers.
    """
    path = os.path.join(root, LABELS_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} cannot be read ({error}). Repair or remove it", data_path=root) from None
    pairs = content.get("labels") if isinstance(content, dict) else None
    if not pairs:
        return None
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not isinstance(pairs, list):
        raise _error(root, f"labels is {str(pairs)[:40]}, not a list")
    labels = {}
    for pair in pairs:
        name, label = _read_pair(root, pair)
        if labels.setdefault(name, label) != label:
            raise _error(root, f"{name} has the labels {labels[name]} and {label}")
    return labels


def _read_pair(root, pair):
    """Return (name, label) of an entry; a class number that is stored as a float is one too."""
    name, label = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
    is_number = isinstance(label, (int, float)) and not isinstance(label, bool)
    if not isinstance(name, str) or not is_number or not 0 <= label < MAX_LABEL or label != int(label):
        raise _error(root, f"{str(pair)[:60]} is not a file and a class number")
    return os.path.normpath(name.replace("\\", "/")), int(label)


def _error(root, problem):
    return ArgumentError(f"{os.path.join(root, LABELS_FILE)}: {problem}. Repair or remove it; without it the folders "
                         "are the classes", data_path=root)
