"""IS, KID, precision and recall against the libraries' own functions; error bars and FID-infinity against truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unit.evaluate.test_frechet import features, gaussian
from xar_cli.evaluate import metrics
from xar_cli.evaluate.frechet import Gaussian, frechet_distance


def float32(count: int, dimensions: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return features(count, dimensions, seed, shift).astype(np.float32)


def test_inception_score_equals_torch_fidelity() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * float32(237, 20)
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=True, rng_seed=2020)
    ours = metrics.inception_score(logits, metrics.torch_fidelity_splits(237))
    assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert ours.error == pytest.approx(theirs["inception_score_std"], rel=1e-10)


def test_inception_score_limits() -> None:
    sure = 200 * np.eye(10, dtype=np.float32)[np.arange(1000) % 10]
    assert metrics.inception_score(sure, [np.arange(1000)]).value == pytest.approx(10)
    assert metrics.inception_score(np.zeros((50, 10), np.float32), [np.arange(50)]).value == pytest.approx(1)


def test_adm_splits_and_what_class_order_does_to_them() -> None:
    splits = metrics.adm_splits(np.arange(12_000))
    assert [len(rows) for rows in splits] == [5000, 5000, 2000]
    # 10,000 images of 10 classes, sorted: each split of 5,000 sees half of the classes, and the score halves.
    labels = np.arange(10_000) // 1000
    logits = 50 * np.eye(10, dtype=np.float32)[labels]
    ruined = metrics.inception_score(logits, metrics.adm_splits(np.arange(10_000))).value
    shuffled = metrics.inception_score(logits, metrics.adm_splits(np.random.default_rng(0).permutation(10_000))).value
    assert ruined == pytest.approx(5, rel=1e-3)
    assert shuffled == pytest.approx(10, rel=1e-3)


def test_class_order_is_noticed() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(1000) // 100
    assert metrics.is_sorted_by_class(labels)
    assert not metrics.is_sorted_by_class(rng.permutation(labels))
    assert not metrics.is_sorted_by_class(np.arange(1000) % 10)
    assert not metrics.is_sorted_by_class(np.zeros(10, int))  # one class has no order
    assert not metrics.is_sorted_by_class(None)


def test_kid_equals_clean_fid_with_the_same_stream() -> None:
    from cleanfid.fid import kernel_distance

    samples, reference = float32(80, 24), float32(120, 24, 1, shift=0.3)
    np.random.seed(5)
    theirs = kernel_distance(samples, reference)
    ours, size = metrics.kid_clean_fid(samples, reference, seed=5)
    assert ours.value == pytest.approx(theirs, rel=1e-4)
    assert size == 80


def test_kid_of_torch_fidelity_shrinks_its_subsets_to_what_is_there() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    samples, reference = float32(80, 24), float32(120, 24, 1, shift=0.3)
    ours, size = metrics.kid_torch_fidelity(samples, reference)
    theirs = kid_features_to_metric(
        torch.from_numpy(samples), torch.from_numpy(reference), kid_subset_size=80, verbose=False
    )
    assert size == 80
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


def test_precision_and_recall_equal_torch_fidelity() -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    samples, reference = float32(150, 12), float32(230, 12, 1, shift=0.5)
    ours = metrics.precision_recall(samples, reference)
    theirs = prc_features_to_metric(torch.from_numpy(samples), torch.from_numpy(reference), verbose=False)
    assert ours.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours.recall == pytest.approx(theirs["recall"], abs=1e-6)
    assert ours.precision != pytest.approx(ours.recall, abs=0.02)


def test_precision_and_recall_are_the_right_way_round() -> None:
    """Samples on one of two real clusters: all of them are good, and half of what is real is missing."""
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(0, 1, (60, 2)), rng.normal(100, 1, (60, 2))]).astype(np.float32)
    samples = rng.normal(0, 0.3, (60, 2)).astype(np.float32)
    found = metrics.precision_recall(samples, real)
    assert found.precision == 1.0
    assert found.recall < 0.5
    reverse = metrics.precision_recall(real, samples)
    assert (reverse.precision, reverse.recall) == (found.recall, found.precision)


def test_precision_recall_by_hand() -> None:
    """On a line with k = 1: real at 0, 1, 10 (radii 1, 1, 9); samples at 0.5, 30, 40 (radii 29.5, 10, 10)."""
    real, samples = np.array([[0.0], [1.0], [10.0]]), np.array([[0.5], [30.0], [40.0]])
    found = metrics.precision_recall(samples, real, neighbours=1)
    assert found.precision == pytest.approx(1 / 3)  # only 0.5 lies in a real ball; 30 is 20 away from 10
    assert found.recall == 1.0  # all real ones lie within 29.5 of 0.5


def test_a_ball_holds_its_rim() -> None:
    """Real at 0, 1, 2, with k = 1 in balls of radius 1: a sample at 3 is on the rim of one, one at 3.5 is in none."""
    real, samples = np.array([[0.0], [1.0], [2.0]]), np.array([[3.0], [3.5], [9.0]])
    assert metrics.precision_recall(samples, real, neighbours=1).precision == pytest.approx(1 / 3)


def test_neighbours_are_found_in_true_float32_after_a_recipe_in_tf32(monkeypatch) -> None:
    seen = []
    cdist, before = torch.cdist, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    monkeypatch.setattr(
        torch, "cdist", lambda *points: seen.append(torch.backends.cuda.matmul.allow_tf32) or cdist(*points)
    )
    points = np.zeros((5, 2))
    try:
        metrics.precision_recall(points, points)
        metrics.nearest(points, points, 1)
        assert torch.backends.cuda.matmul.allow_tf32  # as it was
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert len(seen) == 5
    assert not any(seen)


def test_precision_recall_needs_neighbours() -> None:
    with pytest.raises(ValueError, match="3 neighbours"):
        metrics.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


@pytest.mark.parametrize("how", ["subsets", "bootstrap"])
def test_error_bars_are_of_the_size_of_the_real_spread(how: str) -> None:
    reference = Gaussian(np.zeros(4), np.eye(4))
    draws = [np.random.default_rng(seed).normal(0.3, 1.1, (400, 4)) for seed in range(60)]
    spread = np.std([frechet_distance(gaussian(rows), reference) for rows in draws])
    stated = np.median([metrics.frechet_with_error(rows, reference, how).error for rows in draws[:15]])
    assert 0.5 < stated / spread < 2


@pytest.mark.parametrize("images_per_class", [1, 2, 5, 10])
def test_labels_that_say_nothing_do_not_change_the_error(images_per_class: int) -> None:
    """Few samples a dimension: a part that is larger than another has less of the bias, which is no spread."""
    reference, labels = Gaussian(np.zeros(48), np.eye(48)), np.arange(200) // images_per_class
    errors = np.array([
        [metrics.frechet_with_error(rows, reference, "subsets", given, seed).error for given in (labels, None)]
        for seed in range(6)
        for rows in [np.random.default_rng(seed).normal(0.05, 1, (200, 48))]
    ])  # fmt: skip
    with_labels, without = np.median(errors, axis=0)
    assert with_labels < 1.5 * without


@pytest.mark.parametrize("total", [4, 5, 7])
def test_a_handful_of_samples_has_an_error_whatever_the_labels(total: int) -> None:
    rows, reference = float32(total, 2), gaussian(features(50, 2, 1))
    for ones in range(total):
        labels = (np.arange(total) >= ones).astype(int)
        for seed in range(8):
            assert metrics.frechet_with_error(rows, reference, "subsets", labels, seed).error is not None


def test_groups_are_equal_and_have_the_classes_in_proportion() -> None:
    labels = np.repeat([7, 10**12, -3], [100, 40, 13])
    groups = metrics._dealt(len(labels), labels, 10, np.random.default_rng(0))
    assert set(np.bincount(groups)) == {15, 16}
    for label, size in ((7, 100), (10**12, 40), (-3, 13)):
        counts = np.bincount(groups[labels == label], minlength=10)
        assert counts.min() >= size // 10
        assert counts.max() <= size // 10 + 1
    assert (groups != metrics._dealt(len(labels), labels, 10, np.random.default_rng(1))).any()


def test_a_balanced_order_is_random_and_every_prefix_has_the_classes_in_proportion() -> None:
    labels = np.repeat([7, 10**12, -3], [100, 40, 13])
    order = metrics._balanced_order(len(labels), labels, np.random.default_rng(0))
    assert sorted(order) == list(range(len(labels)))
    for label, size in ((7, 100), (10**12, 40), (-3, 13)):
        seen = np.cumsum(labels[order] == label)
        expected = size * np.arange(1, len(labels) + 1) / len(labels)
        assert np.abs(seen - expected).max() < 2.5
        places = order[labels[order] == label]
        assert (np.diff(places) < 0).any()  # not in the order of the files
    plain = metrics._balanced_order(200, None, np.random.default_rng(0))
    assert sorted(plain) == list(range(200))
    assert abs(np.corrcoef(plain, np.arange(200))[0, 1]) < 0.3


def test_the_value_does_not_depend_on_the_error_bars() -> None:
    rows, reference = float32(101, 6), gaussian(features(300, 6, 1))
    values = {how: metrics.frechet_with_error(rows, reference, how) for how in ("none", "subsets", "bootstrap")}
    assert values["none"].error is None
    for how in ("subsets", "bootstrap"):
        assert values[how].value == pytest.approx(values["none"].value, rel=1e-9)


def test_subsets_keep_the_classes_in_proportion() -> None:
    """Labels that repeat with the period of the groups must not put one class in each group."""
    labels = np.arange(400) % 10
    rows = np.eye(10)[labels] * 10 + np.random.default_rng(0).normal(0, 0.1, (400, 10))
    reference = gaussian(rows[:200])
    balanced = metrics.frechet_with_error(rows, reference, "subsets", labels)
    assert balanced.error is not None
    assert balanced.error < 0.05  # a group of one class alone would move the distance by far more


def bootstrap_ratios(labels: np.ndarray, seeds: int) -> list[float]:
    """The bootstrap's error with labels / without them, of as many rows from each of some seeds."""
    reference, ratios = Gaussian(np.zeros(4), np.eye(4)), []
    for seed in range(seeds):
        rows = np.random.default_rng(seed).normal(0.3, 1.1, (len(labels), 4))
        with_labels = metrics.frechet_with_error(rows, reference, "bootstrap", labels, seed).error
        without = metrics.frechet_with_error(rows, reference, "bootstrap", None, seed + 100).error
        assert with_labels is not None
        assert without is not None
        ratios.append(with_labels / without)
    return ratios


@pytest.mark.parametrize("images_per_class", [1, 2, 10])
def test_a_bootstrap_inside_classes_spreads_as_one_without(images_per_class: int) -> None:
    """Labels that say nothing of the features must not change the error; the noise of the median is a few percent."""
    assert np.median(bootstrap_ratios(np.arange(60) // images_per_class, seeds=40)) == pytest.approx(1, abs=0.12)


def test_a_bootstrap_inside_small_classes_makes_up_for_what_they_cannot_vary() -> None:
    """Drawn from five rows alone the spread is sqrt(4 / 5) = 0.89 of that of new rows."""
    ratios = bootstrap_ratios(np.arange(300) // 5, seeds=160)
    assert np.mean(ratios) == pytest.approx(1, abs=0.06)


def test_small_classes_beside_large_ones_are_drawn_together() -> None:
    """Forty classes of one image would not vary at all, each drawn from itself."""
    labels = np.array([0] * 10 + [1] * 10 + list(range(2, 42)))
    assert np.median(bootstrap_ratios(labels, seeds=20)) == pytest.approx(1, abs=0.15)


def test_extrapolation_takes_the_bias_away() -> None:
    """Samples of the reference's own Gaussian: 0 at infinity, clearly above at any finite count."""
    dimensions = 12
    reference = Gaussian(np.zeros(dimensions), np.eye(dimensions))
    found = [
        (metrics.frechet_distance(gaussian(rows), reference), metrics.frechet_at_infinity(rows, reference))
        for rows in (np.random.default_rng(seed).normal(size=(600, dimensions)) for seed in range(8))
    ]
    biased = np.mean([finite for finite, _ in found])
    at_infinity = np.mean([estimate.value for _, estimate in found if estimate])
    assert biased > 0.05
    assert abs(at_infinity) < 0.3 * biased


def test_the_counts_of_the_extrapolation_are_mixtures_of_all_classes() -> None:
    """Rows sorted by class, with means far apart: the first tenth of them alone would be far from the reference."""
    labels = np.arange(1000) // 100
    rows = np.random.default_rng(0).normal(size=(1000, 4)) + 5 * labels[:, None]
    for given in (labels, None):
        estimate = metrics.frechet_at_infinity(rows, gaussian(rows), given, with_error=False)
        assert abs(estimate.value) < 5


def test_the_error_of_the_extrapolation_is_of_the_size_of_its_spread() -> None:
    """How far ten distances of the same samples lie from their line would be half of it, or less."""
    reference, found = Gaussian(np.zeros(8), np.eye(8)), []
    for seed in range(40):
        rows = np.random.default_rng(seed).normal(0.1, 1.05, (400, 8))
        found.append(metrics.frechet_at_infinity(rows, reference, seed=seed))
    spread = np.std([estimate.value for estimate in found], ddof=1)
    stated = np.median([estimate.error for estimate in found])
    assert 0.8 < stated / spread < 1.8
    assert metrics.frechet_at_infinity(rows, reference, seed=39, with_error=False) == metrics.Estimate(found[-1].value)


@pytest.mark.parametrize(("total", "dimensions", "first"), [(1000, 4, 100), (600, 90, 180)])
def test_the_line_goes_from_a_tenth_of_the_samples_or_two_a_dimension_to_all(
    monkeypatch, total, dimensions, first
) -> None:
    counts, reference = [], gaussian(features(200, dimensions, 1))
    whole = metrics.Moments.gaussian
    monkeypatch.setattr(metrics.Moments, "gaussian", lambda moments: counts.append(moments.count) or whole(moments))
    metrics.frechet_at_infinity(float32(total, dimensions), reference, with_error=False)
    assert (counts[0], counts[-1], len(counts)) == (first, total, 10)
    assert np.diff(1 / np.array(counts)) == pytest.approx(-(1 / first - 1 / total) / 9, rel=0.2)


def test_extrapolation_needs_more_samples_than_dimensions() -> None:
    assert metrics.frechet_at_infinity(float32(47, 12), gaussian(features(100, 12))) is None


def test_nearest_by_hand() -> None:
    real = np.array([[0.0, 0], [5, 0], [0, 9]])
    assert metrics.nearest(np.array([[4.0, 0], [0, 8]]), real, 2).tolist() == [[1, 0], [2, 0]]
