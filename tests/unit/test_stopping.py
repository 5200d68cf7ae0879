"""Signals are noted and end the work between two pieces of it."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from xar_cli import stopping
from xar_cli.stopping import stop_at_once, stop_between_pieces

BOTH = (signal.SIGINT, signal.SIGTERM)


def work(pieces, number, asks=True):
    """Work in which a signal comes in each piece; lists the pieces that were done."""
    with stop_between_pieces(*BOTH) as stop:
        for piece in range(3):
            if asks:
                stop()
            signal.raise_signal(number)
            pieces.append(piece)


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_work_at_the_next_piece(number, end):
    before, pieces = [signal.getsignal(each) for each in BOTH], []
    with pytest.raises(end) as caught:
        work(pieces, number)
    assert pieces == [0]
    assert end is KeyboardInterrupt or caught.value.code == 143
    assert [signal.getsignal(each) for each in BOTH] == before


def test_a_signal_in_the_last_piece_ends_what_would_come_after_it():
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        work(pieces, signal.SIGINT, asks=False)
    assert pieces == [0, 1, 2]


@pytest.mark.parametrize("number", BOTH)
def test_a_late_second_signal_acts_at_once_and_a_copy_of_the_first_does_not(number, monkeypatch):
    monkeypatch.setattr(stopping.time, "monotonic", iter([100.0, 101.9, 102.1]).__next__)
    pieces = []
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        work(pieces, number, asks=False)
    assert pieces == [0, 1]


def test_around_pieces_a_signal_ends_the_work_at_once():
    before, reached = signal.getsignal(signal.SIGTERM), []

    def around():
        with stop_at_once(signal.SIGTERM):
            with stop_between_pieces(*BOTH) as stop:
                stop()
            reached.append("around")
            signal.raise_signal(signal.SIGTERM)
            reached.append("beyond")

    with pytest.raises(SystemExit) as caught:
        around()
    assert (caught.value.code, reached) == (143, ["around"])
    assert signal.getsignal(signal.SIGTERM) is before
    pieces = []
    with pytest.raises(SystemExit), stop_at_once(signal.SIGTERM):
        work(pieces, signal.SIGTERM)
    assert pieces == [0]


def test_without_a_signal_nothing_happens():
    before = [signal.getsignal(number) for number in BOTH]
    with stop_between_pieces(*BOTH) as stop:
        stop()
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in BOTH] == before


def test_handlers_of_others_stay():
    noted = []
    before = signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    try:
        with stop_between_pieces(*BOTH):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted == [signal.SIGTERM]


def test_in_another_thread_no_handler_is_set():
    before = signal.getsignal(signal.SIGINT)

    def work():
        with stop_between_pieces(signal.SIGINT) as stop:
            stop()
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() is before
