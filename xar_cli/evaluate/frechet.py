"""The Frechet distance between two Gaussians, by symmetric eigendecompositions.

Owns one formula. Knows nothing of images, networks or files.
"""

from __future__ import annotations

import numpy as np
import torch


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Dowson and Landau 1982, equation 4.

    tr (sigma1 sigma2)^(1/2) is the sum of the square roots of the eigenvalues of A' sigma2 A with A A' = sigma1, which is
    symmetric and positive semidefinite. So nothing turns complex, and singular covariances (fewer samples than dimensions,
    constant images) need no added diagonal. Negative eigenvalues are rounding and count as 0.

    Args:
        mu1: (D,) means; sigma1: (D, D) covariance; mu2, sigma2: the same of the other Gaussian. Any float type.

    Returns:
        The squared distance, never below 0.

    Raises:
        ValueError: shapes differ.
    """
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    sigma1, sigma2 = np.asarray(sigma1, np.float64), np.asarray(sigma2, np.float64)
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        raise ValueError(f"shapes differ: {mu1.shape}, {sigma1.shape} against {mu2.shape}, {sigma2.shape}")
    difference = mu1 - mu2
    values, vectors = _eigh(sigma1)
    root = vectors * np.sqrt(np.clip(values, 0, None))  # A, with A A' = sigma1
    inner, _ = _eigh(root.T @ sigma2 @ root)
    trace_of_root = np.sqrt(np.clip(inner, 0, None)).sum()
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)


def _eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of the symmetric part of a matrix."""
    values, vectors = torch.linalg.eigh(torch.from_numpy((matrix + matrix.T) / 2))
    return values.numpy(), vectors.numpy()
