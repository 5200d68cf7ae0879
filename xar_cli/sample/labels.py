"""Which classes to draw: numbers, ranges and names on the command line become labels."""

from __future__ import annotations

from collections.abc import Sequence

from xar_cli.errors import UserError, nearest


def parse_classes(text: str | None, num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """The labels that a text such as '3', '0-9' or 'otter,360,goldfish' stands for, in its order.

    A name is looked for among `names` (one per class, synonyms divided by commas), whole synonyms first and then as
    part of one; it must fit exactly one class. None stands for all classes; a model without classes has the label 0.

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
        if part.isdigit() and part not in names:
            labels.append(_in_range(int(part), num_classes))
        elif dash and first.isdigit() and last.isdigit():
            labels.extend(range(_in_range(int(first), num_classes), _in_range(int(last), num_classes) + 1))
        else:
            labels.append(_find_name(part, names))
    if not labels:
        raise UserError(f"'{text}' names no class.", "Give a number, a range such as 0-9, or a class name.")
    return labels


def _in_range(label: int, num_classes: int) -> int:
    if label >= num_classes:
        raise UserError(f"There is no class {label}.", f"Classes are numbered 0 to {num_classes - 1}.")
    return label


def _find_name(name: str, names: Sequence[str]) -> int:
    wanted = name.lower()
    synonyms = [[synonym.strip().lower() for synonym in entry.split(",")] for entry in names]
    whole = [label for label, words in enumerate(synonyms) if wanted in words]
    part = [label for label, words in enumerate(synonyms) if any(wanted in word for word in words)]
    found = whole or part
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"{label} ({names[label]})" for label in found[:6])
        raise UserError(f"'{name}' fits several classes.", f"Choose a number: {listed}.")
    match = nearest(wanted, [word for words in synonyms for word in words])
    hint = f"Did you mean '{match}'?" if match else "Give a class number; this model's class names do not have it."
    raise UserError(f"There is no class called '{name}'.", hint)
