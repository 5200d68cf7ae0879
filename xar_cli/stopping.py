"""Signals that end a stage: noted when they come, acted on between two pieces of its work. Training's are its own.

Python runs a handler between any two instructions of the main thread, so in the midst of an executor's own code too.
One that raises there can leave a lock taken for which a worker waits for ever, and so do all who wait for that worker.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

SECONDS_OF_ONE_STOP = 2.0  # within which a terminal and a launcher may both send the same Ctrl-C to a process


@contextmanager
def stop_between_pieces(*numbers: signal.Signals) -> Iterator[Callable[[], None]]:
    """Have these signals end the work between two pieces of it. Those that somebody else handles are left alone, and so
    are all of them in another thread than the main one.

    Yields:
        a function to call between two pieces. Where a signal has come it raises, and the end of the block does:
        KeyboardInterrupt for SIGINT, SystemExit(128 + number) for others. A second signal that comes more than
        two seconds after the first raises at once, wherever the work is.
    """
    stop = _Stop()
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if is_main_thread}
    ours = {number: old for number, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler, _end)}
    for number in ours:
        signal.signal(number, stop.note)
    try:
        yield stop.act
    finally:
        for number, old in ours.items():
            signal.signal(number, old)
    stop.act()  # the work is done, but not what would have come after it


@contextmanager
def stop_at_once(number: signal.Signals) -> Iterator[None]:
    """Have a signal raise wherever the work is, so that what was made for a time is removed on the way out; where the
    work is in pieces, between two of them. What is raised, and what is left alone, is as for `stop_between_pieces`.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    ours = is_main_thread and signal.getsignal(number) == signal.SIG_DFL
    if ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        if ours:
            signal.signal(number, signal.SIG_DFL)


class _Stop:
    """Whether a signal has come."""

    def __init__(self) -> None:
        self._received = 0  # the first signal
        self._since = 0.0

    def act(self) -> None:
        """Raise where one has come."""
        if self._received:
            _end(self._received)

    def note(self, number: int, _: object) -> None:
        """The handler."""
        if not self._received:
            self._received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SECONDS_OF_ONE_STOP:
            _end(number)


def _end(number: int, _: object = None) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
