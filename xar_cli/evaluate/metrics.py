"""The metrics as functions of features: Inception Score, KID, precision and recall, errors, FID-infinity.

Each follows its source to the letter where that source's number is to be reproduced. Nothing here reads images or
files; features may be memory-mapped, and only a part of them is in memory at a time.
Legend: N samples, D dimensions, S splits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xar_cli.evaluate.frechet import Gaussian, Moments, frechet_distance
from xar_cli.precision import float32_arithmetic

CHUNK = 4096  # rows of a memory-mapped table in memory at a time
TORCH_FIDELITY_SEED = 2020
ADM_SPLIT = 5000
ADM_NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOUR_BLOCK = 2048
GROUPS = 10  # disjoint subsets behind an error bar
BOOTSTRAPS = 20
SMALLEST_STRATUM = 5  # images of a class from which the bootstrap draws inside it
EXTRAPOLATION_POINTS = 10


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error; None where nothing was estimated."""

    value: float
    error: float | None = None


def chunks(features: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of a table, some thousands at a time."""
    for start in range(0, len(features), CHUNK):
        yield features[start : start + CHUNK]


def moments(features: np.ndarray) -> Moments:
    """Streaming moments of an (N, D) table."""
    result = Moments(features.shape[1])
    for chunk in chunks(features):
        result.update(chunk)
    return result


def frechet_with_error(
    features: np.ndarray, reference: Gaussian, error_bars: str, labels: np.ndarray | None = None, seed: int = 0
) -> Estimate:
    """Frechet distance of (N, D) features to a reference, with its standard error.

    The error speaks of the samples; the reference is taken as given. Where labels are known, every subset and every
    bootstrap set has the classes in the proportions of the whole, as a new set of samples would.

    Args:
        error_bars: `subsets`: jackknife over ten disjoint subsets, each left out in turn. `bootstrap`: twenty sets of N
            drawn with replacement, of each class as many as it has; classes of fewer than five are taken together. Far
            too large below some 20 samples a dimension, for repeated rows look like fewer. `none`: no error.
        labels: (N,) classes, or None.
    """
    rng = np.random.default_rng(seed)
    if error_bars == "bootstrap":
        value = frechet_distance(moments(features).gaussian(), reference)
        strata = _strata(len(features), labels)
        drawn = [
            frechet_distance(_moments_of_rows(features, _resample(strata, rng)).gaussian(), reference)
            for _ in range(BOOTSTRAPS)
        ]
        # Rows drawn from n rows spread by (n - 1) / n of the variance of new ones: over all, (N - strata) / N.
        shrunk = 1 - len(strata) / len(features)
        return Estimate(value, float(np.std(drawn, ddof=1) / np.sqrt(shrunk)))
    count = min(GROUPS, len(features) // 2) if error_bars == "subsets" else 1
    if count < 2:
        return Estimate(frechet_distance(moments(features).gaussian(), reference))
    group_of = _dealt(len(features), labels, count, rng)
    parts = [_moments_of_rows(features, np.flatnonzero(group_of == group)) for group in range(count)]
    value = frechet_distance(_together(parts).gaussian(), reference)
    return Estimate(
        value,
        _jackknife([
            frechet_distance(_together(parts[:group] + parts[group + 1 :]).gaussian(), reference)
            for group in range(count)
        ]),
    )  # fmt: skip


def frechet_at_infinity(
    features: np.ndarray,
    reference: Gaussian,
    labels: np.ndarray | None = None,
    seed: int = 0,
    with_error: bool = True,
) -> Estimate | None:
    """The Frechet distance that infinitely many samples would give: a line in 1/N through ten counts, at 1/N = 0.

    The bias of a finite count falls as 1/N (Chong and Forsyth 2020), once N is well above the dimensions D. The counts
    run from N/10, but 2 D at least, to N, evenly in 1/N, each a prefix of one random order, balanced over the classes
    where labels are known. Fewer than 4 D samples give no line: then None.

    The error is a jackknife of the whole: ten disjoint subsets, each left out in turn, and a line through what is left.
    How far the ten distances lie from their line would not tell it: their samples are the same ones. It costs ten times
    the estimate.
    """
    total, dimensions = features.shape
    if total < 4 * dimensions:
        return None
    rng = np.random.default_rng(seed)
    order = _balanced_order(total, labels, rng)
    value = _intercept(features, reference, order)
    if not with_error:
        return Estimate(value)
    group_of = _dealt(total, labels, GROUPS, rng)
    return Estimate(
        value, _jackknife([_intercept(features, reference, order[group_of[order] != group]) for group in range(GROUPS)])
    )


def _intercept(features: np.ndarray, reference: Gaussian, order: np.ndarray) -> float:
    """The line of `frechet_at_infinity` at 1/N = 0, through prefixes of these rows."""
    total, dimensions = len(order), features.shape[1]
    smallest = max(total // 10, 2 * dimensions)
    counts = np.unique(np.rint(1 / np.linspace(1 / total, 1 / smallest, EXTRAPOLATION_POINTS)).astype(int))
    running, distances = Moments(dimensions), []
    for before, count in zip([0, *counts[:-1]], counts, strict=True):
        running = running.merged(_moments_of_rows(features, np.sort(order[before:count])))
        distances.append(frechet_distance(running.gaussian(), reference))
    return float(np.polynomial.polynomial.polyfit(1 / counts, distances, 1)[0])


def _jackknife(left_out: list[float]) -> float:
    """Standard error of a number, from what it is without each of some equal parts of the samples."""
    values = np.array(left_out)
    return float(np.sqrt((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum()))


def _together(parts: list[Moments]) -> Moments:
    return functools.reduce(Moments.merged, parts)


def _moments_of_rows(features: np.ndarray, rows: np.ndarray) -> Moments:
    result = Moments(features.shape[1])
    for start in range(0, len(rows), CHUNK):
        result.update(features[rows[start : start + CHUNK]])
    return result


def _dealt(total: int, labels: np.ndarray | None, count: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) group of each row: rows are dealt round, class after class, so that groups differ in size by one at most."""
    classes = _classes(total, labels)
    order = np.lexsort((rng.random(total), rng.permutation(classes.max() + 1)[classes]))
    groups = np.empty(total, np.int64)
    groups[order] = np.arange(total) % count
    return groups


def _balanced_order(total: int, labels: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """A random order of which every prefix has the classes in nearly the proportions of the whole."""
    classes = _classes(total, labels)
    shuffled = np.lexsort((rng.random(total), classes))
    sizes = np.bincount(classes)
    place = np.empty(total)
    place[shuffled] = np.arange(total) - (np.cumsum(sizes) - sizes)[classes[shuffled]]  # among the rows of its class
    return np.argsort((place + rng.random(total)) / sizes[classes], kind="stable")


def _classes(total: int, labels: np.ndarray | None) -> np.ndarray:
    """(N,) class of each row, counted from 0; all the same without labels."""
    return np.zeros(total, np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]


def _strata(total: int, labels: np.ndarray | None) -> list[np.ndarray]:
    """Rows of each class; the classes too small to be drawn from alone are one, as is all without labels."""
    if labels is None:
        return [np.arange(total)]
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    large = np.flatnonzero(sizes >= SMALLEST_STRATUM)
    rest = np.flatnonzero(sizes[classes] < SMALLEST_STRATUM)
    return [np.flatnonzero(classes == one) for one in large] + ([rest] if len(rest) else [])


def _resample(strata: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Rows drawn with replacement, as many from each stratum as it has."""
    return np.sort(np.concatenate([rng.choice(rows, len(rows)) for rows in strata]))


def inception_score(logits: np.ndarray, splits: list[np.ndarray]) -> Estimate:
    """exp(E KL(p(y|x) || p(y))), the mean over splits, and its spread over them (Salimans et al. 2016).

    Args:
        logits: (N, classes), without the classifier's bias, as both ADM and torch-fidelity have it.
        splits: rows of each split.
    """
    scores = []
    for rows in splits:
        values = torch.from_numpy(np.asarray(logits[rows], np.float64))
        log_p = values.log_softmax(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean()
        scores.append(divergence.exp().item())
    return Estimate(float(np.mean(scores)), float(np.std(scores)) if len(scores) > 1 else None)


def torch_fidelity_splits(count: int, splits: int = 10) -> list[np.ndarray]:
    """torch-fidelity's: a fixed shuffle, then ten parts."""
    order = np.random.RandomState(TORCH_FIDELITY_SEED).permutation(count)
    return [order[i * count // splits : (i + 1) * count // splits] for i in range(splits)]


def adm_splits(order: np.ndarray) -> list[np.ndarray]:
    """ADM's: parts of 5,000 in the order given; the last may be shorter."""
    return [order[start : start + ADM_SPLIT] for start in range(0, len(order), ADM_SPLIT)]


def is_sorted_by_class(labels: np.ndarray | None) -> bool:
    """Whether classes lie in long runs: then parts in file order hold few classes, and ADM's score is ruined.

    Random order changes class at nearly each step. Sorted means: fewer than half of the changes expected then.
    """
    if labels is None or len(labels) < 2:
        return False
    frequency = np.unique(labels, return_counts=True)[1] / len(labels)
    expected = (1 - (frequency**2).sum()) * (len(labels) - 1)
    return bool((labels[1:] != labels[:-1]).sum() < expected / 2)


def kid_torch_fidelity(features: np.ndarray, reference: np.ndarray) -> tuple[Estimate, int]:
    """torch-fidelity's KID, by its own function: mean over 100 subsets, and the spread over them.

    Returns:
        The estimate, and the subset size: 1,000, or all of the smaller set where there are fewer.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(features), len(reference))
    found = kid_features_to_metric(
        torch.from_numpy(np.array(features)), torch.from_numpy(np.array(reference)),
        kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False,
    )  # fmt: skip
    return Estimate(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]), size


def kid_clean_fid(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[Estimate, int]:
    """clean-fid's KID: the unbiased cubic MMD, a mean over 100 random subsets of at most 1,000.

    The library draws from NumPy's global stream; here the same stream starts at `seed`.

    Returns:
        The estimate (no error: the library gives none), and the subset size.
    """
    dimensions = features.shape[1]
    size = min(KID_SUBSET_SIZE, len(features), len(reference))
    rng, total = np.random.RandomState(seed), 0.0
    for _ in range(KID_SUBSETS):
        x = reference[np.sort(rng.choice(len(reference), size, replace=False))].astype(np.float64)
        y = features[np.sort(rng.choice(len(features), size, replace=False))].astype(np.float64)
        within = (x @ x.T / dimensions + 1) ** 3 + (y @ y.T / dimensions + 1) ** 3
        across = (x @ y.T / dimensions + 1) ** 3
        total += (within.sum() - np.trace(within)) / (size - 1) - 2 * across.sum() / size
    return Estimate(total / KID_SUBSETS / size), size


@dataclass(frozen=True)
class PrecisionRecall:
    """Share of samples inside the real manifold, and of real images inside that of the samples."""

    precision: float
    recall: float


@float32_arithmetic("fp32")
def precision_recall(
    features: np.ndarray, reference: np.ndarray, neighbours: int = ADM_NEIGHBOURS, device: str | torch.device = "cpu"
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019): manifolds are balls to the k-th neighbour.

    Precision asks whether a **generated** image lies in a ball around a **real** one, recall the reverse.
    torch-fidelity before 0.4.0 had the two names swapped.

    Args:
        features: (N, D) of generated images; reference: (M, D) of real ones.

    Raises:
        ValueError: a set has no k-th neighbour.
    """
    if min(len(features), len(reference)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {neighbours} images on both sides")
    generated, real = _on(features, device), _on(reference, device)
    return PrecisionRecall(
        precision=_share_inside(generated, real, _radii(real, neighbours)),
        recall=_share_inside(real, generated, _radii(generated, neighbours)),
    )


@float32_arithmetic("fp32")
def nearest(features: np.ndarray, reference: np.ndarray, count: int, device: str | torch.device = "cpu") -> np.ndarray:
    """(N, count) indices of the reference rows nearest to each row of `features`, nearest first."""
    generated, real = _on(features, device), _on(reference, device)
    count = min(count, len(real))
    found = [
        torch.cdist(part, real).topk(count, dim=1, largest=False).indices.cpu()
        for part in generated.split(NEIGHBOUR_BLOCK)
    ]
    return torch.cat(found).numpy()


def _on(features: np.ndarray, device: str | torch.device) -> Tensor:
    return torch.from_numpy(np.array(features, np.float32)).to(device)


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """(N,) distance to the k-th neighbour other than the point itself."""
    found = [torch.cdist(part, points).kthvalue(neighbours + 1).values for part in points.split(NEIGHBOUR_BLOCK)]
    return torch.cat(found)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(NEIGHBOUR_BLOCK)]
    return torch.cat(inside).double().mean().item()
