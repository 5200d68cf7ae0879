import torch

from xar_cli.train.loss_scale import GOOD_STEPS_TO_GROW, INITIAL_SCALE, LossScale


def test_halved_after_a_bad_step_doubled_after_many_good_ones():
    scale, good, bad = LossScale(torch.device("cpu")), torch.tensor(False), torch.tensor(True)
    scale.update(bad)
    assert scale.scale == INITIAL_SCALE / 2
    for _ in range(GOOD_STEPS_TO_GROW - 1):
        scale.update(good)
    assert scale.scale == INITIAL_SCALE / 2
    other = LossScale(torch.device("cpu"))
    other.load(scale.tensors())
    other.update(good)
    assert other.scale == INITIAL_SCALE
    other.update(good)
    assert other.scale == INITIAL_SCALE
