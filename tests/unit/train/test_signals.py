"""Signals that ask a run to stop, as one process meets them."""

import signal

import pytest

from xar_cli.train import signals
from xar_cli.train.signals import StopRequest, stop_signals


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def _handlers_of_before():
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_only_a_late_second_ctrl_c_acts_at_once(clock, first):
    request = StopRequest()
    request.note(first, None)
    clock[0] += 1.9
    request.note(signal.SIGINT, None)
    clock[0] += 0.2
    with pytest.raises(KeyboardInterrupt):
        request.note(signal.SIGINT, None)


def test_the_first_signal_counts():
    request = StopRequest()
    request.note(signal.SIGINT, None)
    request.note(signal.SIGTERM, None)
    assert request.interrupted


def test_a_copy_of_ctrl_c_that_comes_after_the_end_is_harmless():
    with stop_signals():
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_without_a_stop_all_handlers_are_as_before():
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    with stop_signals():
        assert signal.getsignal(signal.SIGINT) is not before[1]
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before
