"""Noise and labels depend on (seed, image index) alone."""

from __future__ import annotations

from collections import Counter

import torch

from xar_cli.sample.noise import AddressedNoise, balanced_label

CPU = torch.device("cpu")
STORED_SUM = -2.127414


def draw(indices, seed=3, entity=1, draws=4):
    return AddressedNoise(seed, indices, 2, CPU).draw(entity, 5, draws)


def test_same_in_any_batch():
    together, alone = draw([7, 11, 2]), draw([11])
    assert together.shape == (4, 3, 5, 2)
    assert torch.equal(together[:, 1], alone[:, 0])


def test_stored_value():
    """Changing how noise is addressed would change every image that was ever made: this number must stay."""
    first = AddressedNoise(0, [0], 16, CPU).draw(0, 64, 1)
    assert abs(first.double().sum().item() - STORED_SUM) < 1e-3


def test_initial_noise_does_not_depend_on_the_number_of_draws():
    assert torch.equal(draw([4], draws=1)[0], draw([4], draws=9)[0])


def test_every_part_of_the_address_matters():
    base = draw([4])
    for other in (draw([5]), draw([4], seed=4), draw([4], entity=2)):
        assert not torch.isclose(base, other).any()


def test_noise_is_standard_normal():
    noise = AddressedNoise(0, range(50), 16, CPU).draw(0, 64, 2)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_every_block_of_labels_holds_each_class_once_in_another_order():
    classes = [3, 1, 4, 5, 9]
    labels = [balanced_label(0, index, classes) for index in range(50)]
    assert Counter(labels) == dict.fromkeys(classes, 10)
    blocks = [tuple(labels[start : start + 5]) for start in range(0, 50, 5)]
    assert all(sorted(block) == sorted(classes) for block in blocks)
    assert len(set(blocks)) > 5
    assert labels != [balanced_label(1, index, classes) for index in range(50)]
