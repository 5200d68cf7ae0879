"""Which moments of a generation become the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xar_cli.config.schema import CellEntity, ScaleEntity
from xar_cli.model import build_grouping
from xar_cli.sample.explain import Moment, Recorder, choose, evenly, picture


@pytest.mark.parametrize(
    ("items", "count", "chosen"),
    [(range(3), 8, [0, 1, 2]), (range(9), 3, [0, 4, 8]), (range(41), 5, [0, 10, 20, 30, 40]), ([7], 4, [7])],
)
def test_evenly_takes_the_first_and_the_last(items, count, chosen):
    assert evenly(items, count) == chosen


def test_recorder_keeps_finished_entities_and_leaves_the_rest_zero():
    grouping = build_grouping(CellEntity(kind="cell", size=2), (4, 4))
    record = Recorder(grouping)
    for entity in range(4):
        for t in (1.0, 0.5, 0.0):
            record.note(entity, t, torch.full((1, 4, 1), 10.0 * entity + t))
    assert len(record.moments) == 12
    middle = record.moments[4]
    assert (middle.entity, middle.t) == (1, 0.5)
    assert middle.latents[0].tolist() == [[0, 0, 10.5, 10.5]] * 2 + [[0, 0, 0, 0]] * 2
    assert [[moment.t for moment in row] for row in choose(record.moments, 4)] == [[1.0, 0.5, 0.0]] * 4


def test_each_timestep_is_shown_once():
    """Heun's solver evaluates inner ones twice, and t = 0 before the result comes."""
    record = Recorder(build_grouping(CellEntity(kind="cell", size=2), (2, 2)))
    for value, t in enumerate((1.0, 0.5, 0.5, 0.0, 0.0)):
        record.note(0, t, torch.full((1, 4, 1), float(value)))
    assert [(moment.t, moment.latents[0, 0, 0].item()) for moment in record.moments] == [(1, 0), (0.5, 2), (0, 4)]


def test_recorder_shows_the_newest_scale():
    record = Recorder(build_grouping(ScaleEntity(kind="scale", sizes=(1, 2)), (2, 2)))
    record.note(0, 0.0, torch.full((1, 1, 1), 3.0))
    record.note(1, 0.0, torch.arange(4.0).view(1, 4, 1))
    assert [moment.latents[0].tolist() for moment in record.moments] == [[[3, 3], [3, 3]], [[0, 1], [2, 3]]]


def test_tiles_keep_the_proportions_of_the_image():
    """A white square in the lower right quarter of an 8 x 16 image stays a square of the tile's height over two."""
    image = np.zeros((1, 8, 16), np.uint8)
    image[:, 4:, 12:] = 255
    moments = [[Moment(0, 1.0, torch.zeros(1)), Moment(0, 0.0, torch.zeros(1))]]
    drawn = np.asarray(picture(moments, [[image, image]], 1).convert("L"))
    assert drawn.shape == (56 + 18 + 4, 92 + 2 * (112 + 4))
    tile = drawn[18 : 18 + 56, 92 : 92 + 112]
    assert (tile[28:, 84:] == 255).all()
    assert (tile == 255).sum() == 28 * 28
