"""Names of classes, which are names of folders: as people see them, and as a log shows them."""
import unicodedata
from collections import defaultdict

MAX_SHOWN = 8  # classes that a line of the log names
# Folders of these names hold the parts of a data set, not its classes.
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


def visible_form(name):
    """Return what names that look alike share, whatever their Unicode form, case, spaces and invisible characters."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join("".join(letter for letter in text if unicodedata.category(letter) != "Cf").split())


def printable(name):
    """Return a name from the disk as it may stand in a line: quoted if it has characters that do not print."""
    return name if name.isprintable() else repr(name)


def describe_classes(class_names):
    """Return a line with number and name of each class, or of the first ones and the last one."""
    classes = [f"{number} {printable(name)}" for number, name in enumerate(class_names)]
    if len(classes) > MAX_SHOWN + 1:
        classes[MAX_SHOWN:-1] = ["..."]
    return f"Classes: {', '.join(classes)}"


def suspicious_names(class_names):
    """Yield warnings about names of folders that hardly are the classes that the user means."""
    if len(class_names) > 1 and {visible_form(name) for name in class_names} <= SPLIT_NAMES:
        yield f"WARNING: the classes are named {', '.join(class_names)}. Is this the folder above the data set?"
    numbers = defaultdict(list)
    for number, name in enumerate(class_names):
        numbers[visible_form(name)].append(str(number))
    for alike in numbers.values():
        if len(alike) > 1:
            yield f"WARNING: the classes {' and '.join(alike)} have names that look the same"
