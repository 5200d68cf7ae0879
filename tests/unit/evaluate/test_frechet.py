"""Moments and the Frechet distance, against closed forms and the libraries' own functions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xar_cli.evaluate.frechet import Gaussian, Moments, frechet_distance, trace_of_root


def features(count: int, dimensions: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Correlated, positive, unequal: like a network's."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    scale = np.exp(0.5 * np.random.default_rng(99).normal(size=dimensions))
    return np.maximum(rng.normal(size=(count, dimensions)) @ mixing + shift, 0) * scale


def gaussian(rows: np.ndarray) -> Gaussian:
    return Moments(rows.shape[1]).update(rows).gaussian()


def test_one_dimension_closed_form() -> None:
    # d^2 = (m1 - m2)^2 + (s1 - s2)^2
    first, second = Gaussian(np.array([1.0]), np.array([[4.0]])), Gaussian(np.array([4.0]), np.array([[9.0]]))
    assert frechet_distance(first, second) == pytest.approx(9 + 1, rel=1e-14)


def test_commuting_covariances_closed_form() -> None:
    first = Gaussian(np.zeros(3), np.diag([1.0, 4.0, 0.0]))
    second = Gaussian(np.array([0.0, 0.0, 2.0]), np.diag([9.0, 4.0, 16.0]))
    assert frechet_distance(first, second) == pytest.approx(4 + (3 - 1) ** 2 + 0 + 16, rel=1e-12)


@pytest.mark.parametrize("count", [700, 50])
def test_equals_torch_fidelity_and_scipy(count: int) -> None:
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    one, two = gaussian(features(count, 96)), gaussian(features(count + 30, 96, 1, shift=0.2))
    ours = frechet_distance(one, two)
    theirs = fid_statistics_to_metric(
        {"mu": one.mu, "sigma": one.sigma}, {"mu": two.mu, "sigma": two.sigma}, verbose=False
    )[KEY_METRIC_FID]
    assert ours == pytest.approx(theirs, rel=1e-6)
    if count > 96:
        assert trace_of_root(one, two) == pytest.approx(np.trace(sqrtm(one.sigma @ two.sigma)).real, rel=1e-10)


@pytest.mark.parametrize("count", [400, 30])
def test_identical_sets_give_zero(count: int) -> None:
    rows = 20 * features(count, 64)
    assert frechet_distance(gaussian(rows), gaussian(rows)) < 1e-6
    assert frechet_distance(Gaussian(rows.mean(0), np.cov(rows, rowvar=False)), gaussian(rows)) < 1e-6


def test_constant_images_have_a_distance() -> None:
    constant = np.ones((10, 16)) * 3
    rows = features(200, 16)
    distance = frechet_distance(gaussian(constant), gaussian(rows))
    expected = ((rows.mean(0) - 3) ** 2).sum() + np.trace(np.cov(rows, rowvar=False))
    assert distance == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(gaussian(constant), gaussian(constant)) == 0


def test_fewer_samples_than_dimensions_from_rows_and_from_statistics_agree() -> None:
    small, large = features(20, 64), features(500, 64, 1)
    from_rows = frechet_distance(gaussian(small), gaussian(large))
    singular = Gaussian(small.mean(0), np.cov(small, rowvar=False))
    assert frechet_distance(singular, gaussian(large)) == pytest.approx(from_rows, rel=1e-8)
    assert frechet_distance(gaussian(large), singular) == pytest.approx(from_rows, rel=1e-8)


def test_wide_spectrum_keeps_its_digits() -> None:
    """Where the fast way would lose digits to the square root, the exact one must be taken."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(60, 60)))
    sigma = basis * np.logspace(-11, 3, 60) @ basis.T
    assert frechet_distance(Gaussian(np.zeros(60), sigma), Gaussian(np.zeros(60), sigma.copy())) < 1e-6


def test_other_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="dimensions differ"):
        frechet_distance(gaussian(features(9, 4)), gaussian(features(9, 5)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_moments_do_not_depend_on_the_batches(sizes: list[int], dimensions: int) -> None:
    sizes = [2, *sizes]
    rows = features(sum(sizes), dimensions) + 1e4  # a large mean against the spread
    moments, start = Moments(dimensions), 0
    for size in sizes:
        moments.update(rows[start : start + size])
        start += size
    found = moments.gaussian()
    assert moments.count == len(rows)
    np.testing.assert_allclose(found.mu, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma, np.cov(rows, rowvar=False).reshape(found.sigma.shape), atol=1e-9)


@pytest.mark.parametrize("counts", [(3, 4), (3, 40), (40, 3), (40, 50)])
def test_merged_moments_are_those_of_all_rows(counts: tuple[int, int]) -> None:
    rows = features(sum(counts), 8) + 100
    parts = Moments(8).update(rows[: counts[0]]), Moments(8).update(rows[counts[0] :])
    both = parts[0].merged(parts[1])
    assert (both.count, parts[0].count, parts[1].count) == (sum(counts), *counts)
    np.testing.assert_allclose(both.gaussian().sigma, np.cov(rows, rowvar=False), atol=1e-11)


def test_float32_batches_are_summed_in_float64() -> None:
    rows = (features(20_000, 2) * 1e-3 + 1000).astype(np.float32)
    moments = Moments(2)
    for start in range(0, len(rows), 100):
        moments.update(rows[start : start + 100])
    np.testing.assert_allclose(moments.gaussian().mu, rows.astype(np.float64).mean(0), rtol=1e-14)
    assert not np.allclose(rows.mean(0, dtype=np.float32), rows.astype(np.float64).mean(0), rtol=1e-14)


def test_memory_stays_flat() -> None:
    moments = Moments(16)
    for seed in range(50):
        moments.update(features(64, 16, seed))
    assert sum(rows.nbytes for rows in moments._rows) <= 16 * 16 * 8
    assert moments.count == 3200


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="two samples"):
        Moments(3).update(np.ones((1, 3))).gaussian()
