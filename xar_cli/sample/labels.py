"""Which classes to draw: numbers, ranges and names on the command line become labels."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from xar_cli.errors import UserError

MAX_LISTED = 10  # classes told by name before 'and N more'


def parse_classes(text: str | None, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """The labels that a text such as '3', '0-9' or 'otter,281,goldfish' stands for, each once, in its order.

    A name is looked for among `names` (one per class, synonyms divided by commas), whole synonyms first and then as
    whole words of one; it must fit exactly one class. None stands for all classes; a model without classes has the
    label 0.

    Raises:
        UserError: a number out of range, an unknown name (near misses are offered), or one that fits several classes.
    """
    if num_classes == 0:
        if text is not None:
            raise UserError("This model knows no classes.", "Leave --class away.")
        return [0]
    if text is None:
        return list(range(num_classes))
    labels: list[int] = []
    for part in (piece.strip() for piece in text.split(",")):
        first, dash, last = part.partition("-")
        if part.isdecimal() and part not in names:
            labels.append(_in_range(int(part), num_classes))
        elif dash and first.isdecimal() and last.isdecimal():
            labels.extend(_range(int(first), int(last), num_classes))
        elif not part:
            raise UserError(f"'{text}' names no class.", "Give a number, a range such as 0-9, or a class name.")
        else:
            labels.append(_find_name(part, names))
    return list(dict.fromkeys(labels))


def list_classes(labels: Sequence[int], names: Sequence[str] = ()) -> str:
    """Classes for people, by label and, where there are names, by the first synonym: '360 otter, 1 goldfish'."""
    told = [f"{label} {names[label].split(',')[0]}" if names else str(label) for label in labels[:MAX_LISTED]]
    rest = len(labels) - len(told)
    return ", ".join(told) + (f" and {rest} more" if rest else "")


def _range(first: int, last: int, num_classes: int) -> range:
    if first > last:
        raise UserError(f"The range {first}-{last} is empty.", f"Write {last}-{first}.")
    return range(_in_range(first, num_classes), _in_range(last, num_classes) + 1)


def _in_range(label: int, num_classes: int) -> int:
    if label >= num_classes:
        raise UserError(f"There is no class {label}.", f"Classes are numbered 0 to {num_classes - 1}.")
    return label


def _find_name(name: str, names: Sequence[str]) -> int:
    wanted = name.lower()
    synonyms = [[synonym.strip().lower() for synonym in entry.split(",")] for entry in names]
    whole = [label for label, words in enumerate(synonyms) if wanted in words]
    whole_words = re.compile(rf"(?<!\w){re.escape(wanted)}(?!\w)")  # 'oter' is no part of a motor scooter
    part = [label for label, words in enumerate(synonyms) if any(map(whole_words.search, words))]
    found = whole or part
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{label} ({names[label]})" for label in found[:6])
        raise UserError(f"'{name}' fits several classes.", f"Choose a number: {listed}.")
    close = difflib.get_close_matches(wanted, [word for words in synonyms for word in words], n=3, cutoff=0.6)
    hint = "Give a class number; this model's class names have nothing like it."
    if close:
        hint = f"Did you mean {' or '.join(repr(word) for word in close)}?"
    raise UserError(f"There is no class called '{name}'.", hint)
