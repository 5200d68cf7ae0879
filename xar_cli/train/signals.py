"""Signals that ask a run to stop: noted when they come, acted on between two steps, by all ranks together."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from xar_cli.distributed import Ranks
from xar_cli.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # Slurm's pre-emption: SIGTERM, or what --signal names


class StopError(UserError):
    """A stop signal that came while images were drawn; the loop makes of it what it makes of one between two steps."""


class StopRequest:
    """Whether somebody wants the run to stop."""

    def __init__(self) -> None:
        self._received = 0

    def agreed(self, ranks: Ranks) -> signal.Signals | None:
        """The signal that any rank has received, on all ranks; every rank calls this after the same step."""
        number = ranks.largest(self._received)
        return signal.Signals(number) if number else None

    def interrupt(self) -> None:
        """Raise StopError where this rank has received a signal; for work that takes longer than a step."""
        if self._received:
            raise StopError(f"Stopped by {signal.Signals(self._received).name}.", "The same command goes on.")

    def note(self, number: int, _: object) -> None:
        """The handler; a second SIGINT acts at once."""
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note stop signals instead of dying of them, until the block is left."""
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
