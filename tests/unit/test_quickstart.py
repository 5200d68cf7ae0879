"""How the quickstart finds what its time suffices for on this machine."""

from __future__ import annotations

import pytest

from xar_cli import quickstart
from xar_cli.config import load_recipe


@pytest.mark.parametrize(("together", "alone", "threads"), [(5.0, 0.5, 1), (0.2, 0.4, 4)])
def test_threads_that_hinder_each_other_are_not_used(monkeypatch, together, alone, threads):
    """As on a machine with other work to do."""
    now = [4]
    monkeypatch.setattr(quickstart.torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(quickstart.torch, "set_num_threads", lambda count: now.__setitem__(0, count))
    monkeypatch.setattr(quickstart, "seconds_per_step", lambda *_: together if now[0] > 1 else alone)
    assert quickstart.fastest_step(load_recipe("tiny"), None, "cpu", 1.0) == min(together, alone)
    assert now == [threads]


@pytest.mark.parametrize(("seconds", "warned"), [(100.0, False), (10.0, True)])
def test_too_little_time_for_good_digits_is_told(monkeypatch, seconds, warned):
    said: list[str] = []
    monkeypatch.setattr(quickstart, "fastest_step", lambda *_: 0.2)
    monkeypatch.setattr(quickstart.log, "warning", lambda text, *_: said.append(text))
    config = quickstart.shorten_to_fit(load_recipe("tiny"), None, "cpu", seconds)
    assert config.train.epochs == int(seconds * 5 * 128 / 1500)
    assert bool(said) == warned
