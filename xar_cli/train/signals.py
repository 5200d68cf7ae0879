"""Signals that ask a run to stop: noted when they come, acted on between two steps, by all ranks together."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from xar_cli.distributed import Ranks

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # Slurm's pre-emption: SIGTERM, or what --signal names


class StopRequest:
    """Whether somebody wants the run to stop."""

    def __init__(self) -> None:
        self._received = 0

    def agreed(self, ranks: Ranks) -> signal.Signals | None:
        """The signal that any rank has received, on all ranks; every rank calls this after the same step."""
        number = ranks.largest(self._received)
        return signal.Signals(number) if number else None

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
