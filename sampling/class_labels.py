"""Class labels by number or by name."""
import re

from common.errors import ArgumentError


def get_class_names(class_names, num_classes):
    """Return the names of a model's classes.

    Args:
        class_names (list[str]): Folder names of its data set, or None.
        num_classes (int): Number of classes if there are no folder names.

    Returns:
        list[tuple[str, ...]]: All names of each class. ImageNet's classes, which are recognized by their 1000 folder
        names, have their English name too; without names the tuples are empty.
    """
    names = [(name,) for name in class_names] if class_names else [()] * num_classes
    # ImageNet's folders are n01440764 .. n15075141; a subset of them numbers its classes in another way.
    if len(names) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in class_names or []):
        return names
    from torchvision.models import ResNet50_Weights
    return [(name, *folder) for name, folder in zip(ResNet50_Weights.IMAGENET1K_V2.meta["categories"], names)]


def parse_class_labels(class_labels, class_names, num_classes):
    """Convert names and numbers of classes to labels.

    Args:
        class_labels (list[str]): Numbers 0 .. num_classes - 1, or names in any case.
        class_names (list[str]): Folder names of the model's data set, or None.
        num_classes (int): Number of the model's classes.

    Returns:
        list[int]: The labels.

    Raises:
        ArgumentError: If a number is out of range, or if a name belongs to no class or to several.
    """
    names = get_class_names(class_names, num_classes)
    return [_parse_label(text, names, num_classes) for text in class_labels]


def _parse_label(text, names, num_classes):
    # Names come first: a class may be called "7" without being number 7.
    wanted = text.casefold()
    labels = [label for label, synonyms in enumerate(names) if wanted in (name.casefold() for name in synonyms)]
    if len(labels) == 1:
        return labels[0]
    if labels:
        raise ArgumentError(f"this is the name of classes {', '.join(map(str, labels))}. Give the number.",
                            class_labels=text)
    try:
        label = int(text)
    except ValueError:
        similar = [f"{name!r} ({label})" for label, (name, *_) in enumerate(filter(None, names))
                   if wanted in name.casefold()]
        hint = f"Did you mean {', '.join(similar[:5])}?" if similar else f"Give a number in 0 .. {num_classes - 1}."
        raise ArgumentError(f"no class has this name. {hint}", class_labels=text) from None
    if not 0 <= label < num_classes:
        raise ArgumentError(f"the classes of this model are 0 .. {num_classes - 1}.", class_labels=label)
    return label
