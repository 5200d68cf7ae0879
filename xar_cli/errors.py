"""What a person can fix: one error type, with a sentence and a next step.

Anything that is not a `UserError` is a fault of this program or of the machine and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A problem that the person at the keyboard can fix.

    Args:
        message: one sentence that names the thing at fault.
        next_step: one sentence that says what to do about it.
        exit_code: 2 for bad input found before any work (default), 1 for a failure during the work.
    """

    def __init__(self, message: str, next_step: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type, tuple[str, str, int]]:
        """Pickle with all three fields, so that the error survives the way out of a worker process."""
        return type(self), (self.message, self.next_step, self.exit_code)

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}"


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that is spelled most like `name`, or None when nothing comes near."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A sentence that offers the nearest choice, or else lists all of them."""
    choices = list(choices)
    match = nearest(name, choices)
    return f"Did you mean '{match}'?" if match else f"Choose one of: {', '.join(choices)}."
