"""Class labels by number or by name."""
import pytest

from common.errors import ArgumentError
from sampling.class_labels import parse_class_labels

ANIMALS = ["Cat", "dog", "red panda"]
WNIDS = [f"n{i:08d}" for i in range(1000)]


@pytest.mark.parametrize("texts, names, classes, labels", [
    (["0", "2", "2"], ANIMALS, 3, [0, 2, 2]),
    (["cat", "DOG", "Red Panda"], ANIMALS, 3, [0, 1, 2]),
    (["4"], None, 5, [4]),
    (["7", "0"], [str(i) for i in range(10)], 10, [7, 0]),
    (["2"], ["2", "0", "1"], 3, [0]),  # a name that is a number is a name
    (["golden retriever", "Otter", "88"], None, 1000, [207, 360, 88]),
    (["golden retriever", WNIDS[207], "207"], WNIDS, 1000, [207] * 3),
    (["b", "9"], ["a", "b"], 10, [1, 9]),  # a model may have more classes than its data
])
def test_classes_are_found_by_number_and_by_name(texts, names, classes, labels):
    assert parse_class_labels(texts, names, classes) == labels


@pytest.mark.parametrize("text, names, classes, hint", [
    ("3", ANIMALS, 3, "0 .. 2"),
    ("-1", ANIMALS, 3, "0 .. 2"),
    ("1000", None, 1000, "0 .. 999"),
    ("cardigan", None, 1000, "264, 474"),  # the dog and the garment
    ("panda", ANIMALS, 3, "'red panda' (2)"),
    ("retriever", None, 1000, "'golden retriever' (207)"),
    ("lion", ANIMALS, 3, "0 .. 2"),
    ("1.5", None, 5, "0 .. 4"),
    ("golden retriever", [f"class {i}" for i in range(1000)], 1000, "0 .. 999"),  # not ImageNet
    ("goldfish", ["n01440764", "n02102040"], 1000, "0 .. 999"),  # two of its classes
])
def test_what_is_no_class_or_several_is_an_error_with_a_hint(text, names, classes, hint):
    with pytest.raises(ArgumentError) as caught:
        parse_class_labels([text], names, classes)
    assert str(caught.value.arguments["class_labels"]) == text and hint in str(caught.value)
