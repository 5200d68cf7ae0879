"""Which classes a text on the command line names."""

from __future__ import annotations

import pytest

from xar_cli.data.imagenet import imagenet_names
from xar_cli.errors import UserError
from xar_cli.sample.labels import list_classes, parse_classes

NAMES = ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark, white shark", "tiger shark", "otter"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("3", [3]),
        ("1-3", [1, 2, 3]),
        ("otter,0,goldfish", [4, 0, 1]),
        ("Otter , 2-2", [4, 2]),
        ("carassius AURATUS", [1]),
        ("white shark", [2]),
        ("tiger", [3]),
    ],
)
def test_numbers_ranges_and_names(text, labels):
    assert parse_classes(text, 5, NAMES) == labels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5", ["no class 5", "0 to 4"]),
        ("3-9", ["no class 9"]),
        ("0,3-1", ["3-1 is empty", "1-3"]),
        ("shark", ["several", "2 (great white shark", "3 (tiger shark)"]),
        ("goldfsh", ["goldfsh", "Did you mean 'goldfish'"]),
        ("tager shark", ["'tiger shark' or '"]),
        ("oldfish", ["no class called 'oldfish'", "'goldfish'"]),  # not a part of a word
        ("tige", ["no class called 'tige'"]),
        ("zzzzzz", ["zzzzzz", "class number"]),
        ("²", ["no class called '²'"]),
        ("1-²", ["no class called '1-²'"]),
        ("", ["names no class"]),
        (",", ["names no class"]),
    ],
)
def test_what_names_no_class_is_a_sentence(text, words):
    with pytest.raises(UserError) as caught:
        parse_classes(text, 5, NAMES)
    assert all(word in str(caught.value) for word in words)
    assert caught.value.exit_code == 2


def test_a_class_that_is_called_by_a_number_wins_over_the_number():
    assert parse_classes("0", 2, ["1", "0"]) == [1]


def test_a_model_without_classes():
    assert parse_classes(None, 0) == [0]
    with pytest.raises(UserError, match="knows no classes"):
        parse_classes("3", 0)


def test_imagenet_names():
    names = list(imagenet_names().values())
    assert parse_classes("otter,281,goldfish", 1000, names) == [360, 281, 1]
    with pytest.raises(UserError, match="no class called 'oter'") as caught:
        parse_classes("oter", 1000, names)  # part of a motor scooter
    assert "'otter'" in caught.value.next_step


def test_classes_are_told_by_label_and_name():
    assert list_classes([4, 0], NAMES) == "4 otter, 0 tench"
    assert list_classes([4, 0]) == "4, 0"
    assert list_classes(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
