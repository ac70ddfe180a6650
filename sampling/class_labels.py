"""Class labels by number or by name."""

import re

from common.errors import UserError


def get_class_names(class_names, num_classes):
    """The names of a model's classes: those of its data set, ImageNet's where those are its 1000 folder names, or None.

    return  list of tuples: every name that a class answers to
    """
    folders = [(name,) for name in class_names] if class_names else [()] * num_classes
    # A folder of ImageNet has 1000 classes n01440764 .. n15075141; a subset of it numbers its classes otherwise.
    if len(folders) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in class_names or []):
        return folders
    from torchvision.models import ResNet50_Weights
    return [(name, *folder) for name, folder in zip(ResNet50_Weights.IMAGENET1K_V2.meta["categories"], folders)]


def parse_class_labels(texts, class_names, num_classes):
    """Labels from what --class-labels was given: numbers 0 .. num_classes - 1, or names, spelled as in the data set.

    raise  UserError for a number out of range, a name that no class has, or one that several have
    """
    names = get_class_names(class_names, num_classes)
    return [_parse_label(text, names, num_classes) for text in texts]


def _parse_label(text, names, num_classes):
    # A class named "7" is meant by its name: the digits' are their numbers, other data sets' may not be.
    wanted = text.casefold()
    found = [label for label, own in enumerate(names) if wanted in (name.casefold() for name in own)]
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise UserError(f"--class-labels {text!r}: this is the name of classes {', '.join(map(str, found))}; "
                        "give the number")
    try:
        label = int(text)
    except ValueError:
        near = [f"{own[0]!r} ({label})" for label, own in enumerate(names) if own and wanted in own[0].casefold()]
        hint = f"; did you mean {', '.join(near[:5])}?" if near else f"; give a number in 0 .. {num_classes - 1}"
        raise UserError(f"--class-labels {text!r}: no class has this name{hint}") from None
    if not 0 <= label < num_classes:
        raise UserError(f"--class-labels {label}: this model has the classes 0 .. {num_classes - 1}")
    return label
