import pytest
import torch

from xar_cli.distributed import Ranks
from xar_cli.train.draws import StepDraws
from xar_cli.train.window import BadStep, Window

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def draws(t):
    nothing = torch.zeros(len(t))
    return StepDraws(nothing, torch.tensor(t), nothing, nothing)


def add_step(window, losses, t, bad=False, norm=1.0):
    losses = torch.tensor(losses)
    window.begin_step()
    window.add_losses(losses, draws(t), slice(0, len(losses)))
    window.end_step(losses.mean(), torch.tensor(norm), torch.tensor(bad), 0.1)


def test_sums_by_hand():
    window = Window(ALONE, (1, 2))  # entities of one and two tokens
    add_step(window, [[1.0, 2.0, 4.0], [5.0, 6.0, 8.0]], [[0.05, 0.95], [0.06, 0.55]], norm=3.0)
    add_step(window, [[3.0, 1.0, 1.0]], [[0.05, 1.0]], norm=1.0)
    record, bad = window.read(step=2, images_per_step=2)
    assert bad == []
    assert record["loss"] == pytest.approx((26 / 6 + 5 / 3) / 2)
    assert record["loss_by_entity"] == pytest.approx([(1 + 5 + 3) / 3, (3 + 7 + 1) / 3])
    by_t = record["loss_by_t"]
    assert by_t[0] == pytest.approx((1 + 5 + 3) / 3)
    assert by_t[5] == pytest.approx(7)
    assert by_t[9] == pytest.approx((3 + 1) / 2)  # t = 1 belongs to the last bucket
    assert by_t[1] is None
    assert (record["grad_norm"], record["grad_norm_max"]) == (2.0, 3.0)


def test_a_window_is_empty_after_reading():
    window = Window(ALONE, (1,))
    add_step(window, [[4.0]], [[0.5]])
    window.read(1, 1)
    add_step(window, [[2.0]], [[0.5]])
    record, _ = window.read(2, 1)
    assert record["loss"] == 2
    assert record["loss_by_entity"] == [2]


def test_bad_steps_are_left_out_and_named():
    window, nan = Window(ALONE, (1,)), float("nan")
    add_step(window, [[2.0], [2.0]], [[0.5], [0.5]])
    add_step(window, [[1.0], [nan]], [[0.5], [0.5]], bad=True, norm=nan)
    add_step(window, [[1.0], [1.0]], [[0.5], [0.5]], bad=True, norm=float("inf"))
    record, bad = window.read(13, 2)
    assert record["loss"] == 2
    assert bad == [BadStep(11, (1,)), BadStep(12, ())]
    assert (record["skipped_steps"], record["bad_steps_in_a_row"]) == (2, 2)
    assert record["grad_norm"] == 1
    add_step(window, [[1.0]], [[0.5]], bad=True, norm=nan)
    assert window.read(14, 2)[0]["bad_steps_in_a_row"] == 3
    add_step(window, [[1.0]], [[0.5]])
    assert window.read(15, 2)[0]["bad_steps_in_a_row"] == 0


def test_all_bad():
    window = Window(ALONE, (1,))
    add_step(window, [[float("inf")]], [[0.5]], bad=True, norm=float("inf"))
    record, _ = window.read(1, 1)
    assert record["loss"] is None
    assert record["grad_norm"] is None


def test_many_entities_are_shown_in_groups():
    window = Window(ALONE, (1,) * 64)
    add_step(window, [[float(i) for i in range(64)]], [[0.5] * 64])
    record, _ = window.read(1, 1)
    assert record["loss_by_entity"] == pytest.approx([1.5 + 4 * group for group in range(16)])
