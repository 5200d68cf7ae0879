import numpy as np
import torch

from tests.runs import small_recipe
from xar_cli.model.entities import build_grouping
from xar_cli.train.draws import draw_mirrored, draw_step, seed_dropout

CPU = torch.device("cpu")


def draw(step, *overrides):
    config = small_recipe(*overrides)
    return draw_step(config, build_grouping(config.entity, config.grid), step, CPU)


def test_shapes():
    draws = draw(0)
    assert draws.posterior_noise.shape == (8, 1, 8, 8)
    assert draws.t.shape == (8, 4)
    assert draws.noise.shape == (8, 64, 1)
    assert draws.drop_label.shape == (8,)
    assert draws.rows(slice(2, 5)).noise.equal(draws.noise[2:5])


def test_addressed_by_seed_and_step():
    again, other_step, other_seed = draw(3), draw(4), draw(3, "train.seed=1")
    assert draw(3).noise.equal(again.noise)
    assert draw(3).t.equal(again.t)
    for other in (other_step, other_seed):
        assert not draw(3).noise.equal(other.noise)
        assert not draw(3).t.equal(other.t)


def test_statistics_of_the_published_objective():
    """t is the sigmoid of a standard normal; a label is dropped with p = 0.1; noises are standard normal."""
    draws = draw(0, "train.global_batch_size=20000")
    logits = torch.logit(draws.t.double())
    assert abs(logits.mean().item()) < 0.02
    assert abs(logits.std().item() - 1) < 0.02
    assert abs(draws.drop_label.double().mean().item() - 0.1) < 0.01
    for noise in (draws.noise, draws.posterior_noise):
        assert abs(noise.mean().item()) < 0.01
        assert abs(noise.std().item() - 1) < 0.01
    assert abs(torch.corrcoef(logits.T)[0, 1].item()) < 0.03  # entities are drawn independently


def test_mirrored_half_the_time():
    flips = draw_mirrored(0, 5, 10000)
    assert np.array_equal(flips, draw_mirrored(0, 5, 10000))
    assert not np.array_equal(flips, draw_mirrored(0, 6, 10000))
    assert abs(flips.mean() - 0.5) < 0.02


def test_dropout_differs_by_step_micro_step_and_rank():
    def first(*address):
        seed_dropout(0, *address)
        return torch.rand(4).tolist()

    values = [first(*address) for address in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({tuple(value) for value in values}) == 4
    assert first(0, 0, 0) == values[0]
