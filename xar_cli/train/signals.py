"""Signals that ask a run to stop: noted when they come, acted on between two steps, by all ranks together."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.stopping import SECONDS_OF_ONE_STOP

# Slurm's pre-emption sends SIGTERM, or what --signal names; a terminal that closes sends SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopError(UserError):
    """A stop signal that came while images were drawn; the loop makes of it what it makes of one between two steps."""


class StopRequest:
    """Whether somebody wants the run to stop."""

    def __init__(self) -> None:
        self._received = 0  # the first signal
        self._since = 0.0

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C came first."""
        return self._received == signal.SIGINT

    def agreed(self, ranks: Ranks) -> signal.Signals | None:
        """The signal that any rank has received, on all ranks; every rank calls this after the same step."""
        number = ranks.largest(self._received)
        return signal.Signals(number) if number else None

    def interrupt(self) -> None:
        """Raise StopError where this rank has received a signal; for work that takes longer than a step."""
        if self._received:
            raise StopError(f"Stopped by {signal.Signals(self._received).name}.", "The same command goes on.")

    def note(self, number: int, _: object) -> None:
        """The handler; SIGINT acts at once when a stop was asked for a while ago."""
        if not self._received:
            self._received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > SECONDS_OF_ONE_STOP:
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note stop signals instead of dying of them, until the block is left; after Ctrl-C, SIGINT is noted on.

    The launcher's copy of it may still come, and must not break into an end in good order. SIGHUP stays ignored where
    it is, as under nohup.
    """
    request = StopRequest()
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    before = {number: signal.signal(number, request.note) for number in STOP_SIGNALS if number not in ignored}
    try:
        yield request
    finally:
        for number, handler in before.items():
            if not (number == signal.SIGINT and request.interrupted):
                signal.signal(number, handler)
