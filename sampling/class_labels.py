"""Class labels by number or by name."""
import re
import unicodedata

from common.errors import ArgumentError
from data.class_names import printable, visible_form

MAX_NAMED = 10  # names that a sentence lists


def get_class_names(class_names, num_classes):
    """Return the names of a model's classes.

    Args:
        class_names (list[str]): Folder names of its data set, or None.
        num_classes (int): Number of classes if there are no folder names.

    Returns:
        list[tuple[str, ...]]: All names of each class. ImageNet's classes, which are recognized by their 1000 folder
        names, have their English name too; without names the tuples are empty.
    """
    names = [(str(name),) for name in class_names] if class_names else [()] * num_classes
    # ImageNet's folders are n01440764 .. n15075141; a subset of them numbers its classes in another way.
    if len(names) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name, *_ in filter(None, names)):
        return names
    from torchvision.models import ResNet50_Weights
    return [(name, *folder) for name, folder in zip(ResNet50_Weights.IMAGENET1K_V2.meta["categories"], names)]


def parse_class_labels(class_labels, class_names, num_classes):
    """Convert names and numbers of classes to labels.

    If classes have names that are numbers of other classes (folders 1, 2, 3), numbers are names only.

    Args:
        class_labels (list[str]): Numbers 0 .. num_classes - 1, or names in any Unicode form and case.
        class_names (list[str]): Folder names of the model's data set, or None.
        num_classes (int): Number of the model's classes.

    Returns:
        list[int]: The labels.

    Raises:
        ArgumentError: If a number is out of range, or if a name belongs to no class or to several.
    """
    names = get_class_names(class_names, num_classes)
    return [_parse_label(text, names, num_classes) for text in class_labels]


def typed_labels(labels, class_names, num_classes):
    """Return labels as `parse_class_labels` takes them: numbers, or names if numbers stand for names."""
    names = get_class_names(class_names, num_classes)
    return [names[label][-1] for label in labels] if _numbers_are_names(names, num_classes) else list(labels)


def describe_labels(labels, class_names, num_classes):
    """Describe the different classes among labels by name and number."""
    names = get_class_names(class_names, num_classes)
    return ", ".join(_describe(label, names) for label in dict.fromkeys(labels))


def _describe(label, names):
    return f"{printable(names[label][0])!r} ({label})" if label < len(names) and names[label] else str(label)


def _numbers_are_names(names, num_classes):
    """Return whether the name of a class is the number of another one."""
    numbers = range(num_classes)
    return any(_as_number(name) != label and _as_number(name) in numbers
               for label, synonyms in enumerate(names) for name in synonyms)


def _as_number(text):
    """Return the number that a text shows, None if it shows something else."""
    digits = unicodedata.normalize("NFKC", text).strip()
    return int(digits) if re.fullmatch(r"-?[0-9]{1,18}", digits) else None


def _parse_label(text, names, num_classes):
    # Names come first: a class may be called "7" without being number 7.
    numbers_are_names, wanted = _numbers_are_names(names, num_classes), visible_form(text)
    labels = [label for label, synonyms in enumerate(names) if wanted in map(visible_form, synonyms)]
    if len(labels) > 1 and numbers_are_names:  # the only other way to tell them apart
        labels = [label for label in labels if text in names[label]] or labels
    if len(labels) == 1:
        return labels[0]
    if labels:
        remedy = "Copy the name of its folder" if numbers_are_names else "Give the number"
        raise ArgumentError(f"this is the name of classes {', '.join(map(str, labels))}. {remedy}", class_labels=text)
    number = _as_number(text)
    if number is None or numbers_are_names:
        raise ArgumentError(f"no class has this name. {_hint(text, names, num_classes)}", class_labels=text)
    if not 0 <= number < num_classes:
        raise ArgumentError(f"the classes of this model are 0 .. {num_classes - 1}", class_labels=text)
    return number


def _hint(text, names, num_classes):
    """Suggest what to type instead of a name that no class has."""
    wanted = visible_form(text)
    similar = [_describe(label, names) for label, synonyms in enumerate(names)
               if wanted and _as_number(text) is None and any(wanted in visible_form(name) for name in synonyms[:1])]
    if _numbers_are_names(names, num_classes) and not similar:
        first = [repr(synonyms[-1]) for synonyms in names[:MAX_NAMED]]
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        return f"Some names of classes are numbers, so that only names can be given: {', '.join(first)}{more}"
    return f"Did you mean {', '.join(similar[:5])}?" if similar else f"Give a number in 0 .. {num_classes - 1}"
