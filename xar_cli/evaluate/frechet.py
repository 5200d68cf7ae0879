"""Gaussians in feature space and the Frechet distance between two of them.

Owns streaming moments in float64 and one formula. Knows nothing of images, networks or files.
Legend: N samples, D dimensions, R rank.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
ROOT_TOLERANCE = 1e-10  # relative error of the trace of the root above which the slower, exact way is taken


class Gaussian:
    """Mean and covariance of some features.

    Args:
        mu: (D,) mean.
        sigma: (D, D) covariance, symmetric, perhaps singular; or None where `root` is given.
        root: (D, R) with root @ root.T = sigma, where that is known already.
    """

    def __init__(self, mu: np.ndarray, sigma: np.ndarray | None = None, root: np.ndarray | None = None) -> None:
        self.mu = np.asarray(mu, np.float64)
        self._sigma = None if sigma is None else np.asarray(sigma, np.float64)
        self._root = None if root is None else torch.from_numpy(np.asarray(root, np.float64))

    @cached_property
    def sigma(self) -> np.ndarray:
        """(D, D) float64."""
        if self._sigma is not None:
            return (self._sigma + self._sigma.T) / 2
        return (self.root @ self.root.T).numpy()

    @cached_property
    def root(self) -> Tensor:
        """(D, R) float64: as given, by Cholesky, or by eigenvectors where sigma is singular."""
        if self._root is not None:
            return self._root
        symmetric = torch.from_numpy(self.sigma)
        factor, failed = torch.linalg.cholesky_ex(symmetric)
        if not failed:
            return factor
        values, vectors = torch.linalg.eigh(symmetric)
        kept = values > values.abs().max() * len(values) * EPS
        return vectors[:, kept] * values[kept].sqrt()

    @property
    def has_root(self) -> bool:
        """Whether the root costs nothing more."""
        return self._root is not None or "root" in self.__dict__

    @property
    def trace(self) -> float:
        """Trace of sigma."""
        return float(np.trace(self._sigma)) if self._sigma is not None else self.root.square().sum().item()


class Moments:
    """Streaming count, mean and scatter of features in float64; memory does not grow with the count.

    The first D rows are kept as they are, since so few span their covariance exactly and need no D x D matrix; from
    then on batches are merged by the update of Chan, Golub and LeVeque (1979), which keeps its digits where the
    mean is large against the spread.
    """

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.count = 0
        self._rows: list[np.ndarray] = []
        self._mean = np.zeros(dimensions)
        self._scatter: np.ndarray | None = None

    def update(self, features: np.ndarray) -> Moments:
        """Take (n, D) more features."""
        rows = np.asarray(features, np.float64)
        if len(rows) == 0:
            return self
        if self._scatter is None and self.count + len(rows) <= self.dimensions:
            self._rows.append(rows)
            self.count += len(rows)
        else:
            self._fold()
            self._merge(*_scatter_of(rows))
        return self

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets together; neither of them changes."""
        both = Moments(self.dimensions)
        for part in (self, other):
            for rows in part._rows:
                both.update(rows)
            if part._scatter is not None:
                both._fold()
                both._merge(part.count, part._mean, part._scatter)
        return both

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance; needs two samples at least."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples, not {self.count}")
        if self._scatter is not None:
            return Gaussian(self._mean, self._scatter / (self.count - 1))
        rows = np.concatenate(self._rows)
        mean = rows.mean(axis=0)
        return Gaussian(mean, root=(rows - mean).T / np.sqrt(self.count - 1))

    def _fold(self) -> None:
        """Turn the rows kept so far into a mean and a scatter matrix."""
        if self._scatter is None:
            rows, self._rows, self.count = self._rows, [], 0
            self._scatter = np.zeros((self.dimensions, self.dimensions))
            if rows:
                self._merge(*_scatter_of(np.concatenate(rows)))

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        assert self._scatter is not None
        total = self.count + count
        step = mean - self._mean
        self._mean = self._mean + step * (count / total)
        self._scatter = self._scatter + scatter + np.outer(step, step) * (self.count * count / total)
        self.count = total


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)); Dowson and Landau 1982, equation 4.

    Returns:
        The squared distance, never below 0.

    Raises:
        ValueError: the dimensions differ.
    """
    if first.mu.shape != second.mu.shape:
        raise ValueError(f"dimensions differ: {first.mu.shape} and {second.mu.shape}")
    step = first.mu - second.mu
    return max(float(step @ step + first.trace + second.trace - 2 * trace_of_root(first, second)), 0.0)


def trace_of_root(first: Gaussian, second: Gaussian) -> float:
    """tr (sigma1 sigma2)^(1/2), real and stable for singular covariances, with no diagonal added.

    With sigma_i = A_i A_i' it is the sum of the singular values of A1' A2, and of the square roots of the
    eigenvalues of A1' sigma2 A1. The second way is several times faster for large matrices; the square root
    magnifies rounding in small eigenvalues, so its error is bounded from the eigenvalues found, and where that is
    too large the first way is taken.
    """
    if first.has_root and second.has_root:
        return _sum_of_singular_values(first, second)
    base, other = (first, second) if first.has_root else (second, first)
    inner = base.root.T @ torch.from_numpy(other.sigma) @ base.root
    values = torch.linalg.eigvalsh(inner).clamp(min=0)
    rounding = EPS * values.max()
    total = values.sqrt().sum()
    error = (rounding / values.clamp(min=rounding).sqrt()).sum()
    if error > ROOT_TOLERANCE * total:
        return _sum_of_singular_values(first, second)
    return total.item()


def _sum_of_singular_values(first: Gaussian, second: Gaussian) -> float:
    return torch.linalg.svdvals(first.root.T @ second.root).sum().item()


def _scatter_of(rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    mean = rows.mean(axis=0)
    centred = rows - mean
    return len(rows), mean, centred.T @ centred
