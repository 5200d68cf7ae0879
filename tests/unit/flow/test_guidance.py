"""Guidance scales of the entities, and the guided velocity."""

from __future__ import annotations

import pytest
import torch

from xar_cli.flow.guidance import SCHEDULES, guidance_scales, guided_velocity


def test_schedules():
    assert guidance_scales("linear", 2.7, 4) == pytest.approx([1, 1 + 1.7 / 3, 1 + 3.4 / 3, 2.7])
    assert guidance_scales("constant", 2.7, 3) == [2.7, 2.7, 2.7]
    assert guidance_scales("cosine", 3.0, 3) == pytest.approx([1, 2, 3])
    assert guidance_scales("cosine", 3.0, 5)[1] == pytest.approx(1 + 2 * (1 - 2**-0.5) / 2)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_one_entity_gets_the_whole_scale_and_scale_1_is_exactly_unguided(schedule):
    assert guidance_scales(schedule, 2.5, 1) == [2.5]
    assert set(guidance_scales(schedule, 1.0, 7)) == {1.0}


def test_first_entity_of_the_published_schedule_is_exactly_unguided():
    assert guidance_scales("linear", 2.7, 4)[0] == 1


def test_guided_velocity():
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    assert guided_velocity(conditional, unconditional, 1) == 3
    assert guided_velocity(conditional, unconditional, 0) == 1
    assert guided_velocity(conditional, unconditional, 2.5) == 6
