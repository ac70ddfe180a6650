"""Names of classes as people see them, numbers that are names, and labels that are typed again from a record."""
import pytest

from common.errors import ArgumentError
from sampling.class_labels import describe_labels, parse_class_labels, typed_labels

TWELVE = sorted(str(number) for number in range(12))  # 0, 1, 10, 11, 2, ...
WNIDS = [f"n{i:08d}" for i in range(1000)]


@pytest.mark.parametrize("text, names, label", [
    ("caf\u00e9", ["bar", "cafe\u0301"], 1),
    ("cafe\u0301", ["bar", "caf\u00e9"], 1),
    ("CAF\u00c9", ["bar", "cafe\u0301"], 1),
    ("strasse", ["bar", "Stra\u00dfe"], 1),
    (" red  panda ", ["cat", "red panda"], 1),
    ("\uff43\uff41\uff54", ["dog", "cat"], 1),  # full-width letters
    ("c\u200bat", ["dog", "cat"], 1),  # an invisible space
    ("\u0663", ["a", "b", "c", "d"], None),  # a digit, but not one of 0 .. 9
    ("\uff13", ["a", "b", "c", "d"], 3),
    ("2", ["cat", "dog", "cow"], 2),
    ("7", ["cat", "7"], 1),  # the number of no class
    ("0", ["cat", "7"], 0),
    ("3", [f"{number:05d}" for number in range(5)], 3),  # names that say the same as the numbers
    ("00003", [f"{number:05d}" for number in range(5)], 3),
])
def test_names_are_found_as_people_see_them(text, names, label):
    if label is None:
        with pytest.raises(ArgumentError):
            parse_class_labels([text], names, len(names))
    else:
        assert parse_class_labels([text], names, len(names)) == [label]


@pytest.mark.parametrize("text, names", [
    ("0", ["1", "2", "3"]), ("4", ["1", "2", "3"]), ("1", ["01", "02", "03"]), ("1", ["cat", "0"]), ("-1", ["1", "2"]),
    ("\u2460\u2461", ["1", "2", "3"]),
])
def test_numbers_of_classes_that_have_other_numbers_as_names_are_refused(text, names):
    with pytest.raises(ArgumentError) as caught:
        parse_class_labels([text], names, len(names))
    assert caught.value.arguments == {"class_labels": text}
    assert all(repr(name) in str(caught.value) for name in names)  # what can be typed
    for label, name in enumerate(names):
        assert parse_class_labels([name], names, len(names)) == [label]


@pytest.mark.parametrize("text", ["", " ", "\u200b", "1_0", "+1", "1e0", "0x1", "9" * 5000, "None", "\n"])
def test_what_is_neither_a_name_nor_a_number_is_refused(text):
    with pytest.raises(ArgumentError, match=r"0 \.\. 1") as caught:
        parse_class_labels([text], ["cat", "dog"], 2)
    assert caught.value.arguments == {"class_labels": text}


@pytest.mark.parametrize("names, classes", [
    (TWELVE, 12), (["1", "2", "3"], 3), (["01", "02"], 2), (["cat", "0"], 2), (["cat", "dog"], 2), (None, 5),
    (["cat", "7"], 5), (WNIDS, 1000), (["Cat", "cat"], 2), (["10", "1 0", "1"], 3), (["1", "\uff11", "0"], 3),
    (["a b", "c,d", "\udcff"], 3),
])
def test_recorded_labels_make_the_same_labels_when_typed(names, classes):
    labels = [classes - 1, 0, 1, 1]
    record = typed_labels(labels, names, classes)
    assert parse_class_labels([str(label) for label in record], names, classes) == labels


def test_records_hold_numbers_unless_numbers_are_names():
    assert typed_labels([2, 0], ["cat", "dog", "cow"], 3) == [2, 0]
    assert typed_labels([4, 2], TWELVE, 12) == ["2", "10"]


def test_chosen_classes_are_shown_with_name_and_number():
    assert describe_labels([1, 0, 1], ["cat", "dog"], 2) == "'dog' (1), 'cat' (0)"
    assert describe_labels([207], WNIDS, 1000) == "'golden retriever' (207)"
    assert describe_labels([3], None, 5) == "3"
    assert "\n" not in describe_labels([0], ["a\nb"], 1)


def test_names_of_a_foreign_checkpoint_may_be_numbers():
    assert parse_class_labels(["3", "dog"], [3, "dog"], 2) == [0, 1]


def test_negative_number_as_a_name_leaves_the_numbers_of_the_others():
    names = ["-3", "bat", "cat", "dog"]
    assert parse_class_labels(["3", "0", "-3", "bat"], names, 4) == [3, 0, 0, 1]
