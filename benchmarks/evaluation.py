"""What evaluation costs against the libraries: feature extraction against torch-fidelity's, the Frechet term
against sqrtm.

    python benchmarks/evaluation.py [--pairs 5] [--batch 16] [--skip-compile]

Random Inception weights (the time does not depend on them). Each comparison runs in pairs, A B B A, after a
warm-up, and A against A first as the noise floor; printed are the median ratio, the smallest and the largest. A
ratio is only printed after equal numbers were found in the same run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from xar_cli.evaluate.frechet import Gaussian, Moments, frechet_distance, trace_of_root
from xar_cli.evaluate.inception import InceptionV3
from xar_cli.evaluate.networks import TorchFidelityInception
from xar_cli.evaluate.weights import Weights

CPU = torch.device("cpu")
DIMENSIONS, ROWS = 2048, 6000


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(slow: Callable[[], object], fast: Callable[[], object], pairs: int) -> list[float]:
    """Time of `slow` over time of `fast`, in the order A B B A."""
    found = []
    for pair in range(pairs):
        if pair % 2 == 0:
            first = seconds(slow)
            found.append(first / seconds(fast))
        else:
            second = seconds(fast)
            found.append(seconds(slow) / second)
    return found


def show(name: str, found: list[float]) -> None:
    print(f"{name}: {statistics.median(found):.2f}x (from {min(found):.2f} to {max(found):.2f}, {len(found)} pairs)")


def random_weights(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = InceptionV3().state_dict()
    for name, value in state.items():
        if value.dim() >= 2:
            value.normal_(0, (2.0 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
    torch.save(state, folder / "random.pth")
    return folder / "random.pth"


def extraction(pairs: int, batch: int, compiled: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as name:
        weights = random_weights(Path(name))
        theirs = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights))
        ours = TorchFidelityInception(Weights(weights, "", False), CPU, "fp32", compiled)
        bf16 = TorchFidelityInception(Weights(weights, "", False), CPU, "bf16", compiled)
    uint8 = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def library() -> np.ndarray:
        with torch.no_grad():
            return theirs(uint8)[0].numpy()

    start = time.perf_counter()
    found, expected = ours.features(images)["pool"], library()
    print(f"first pass with {'compile' if compiled else 'no compile'}: {time.perf_counter() - start:.0f} s")
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"features differ by {error:.1e} of their largest (allowed: 1e-4)")
    assert error < 1e-4
    show("noise floor, torch-fidelity against itself", ratios(library, library, pairs))
    show("feature extraction, float32, against torch-fidelity", ratios(library, lambda: ours.features(images), pairs))
    half = bf16.features(images)["pool"]
    error = np.abs(half - expected).max() / np.abs(expected).max()
    show("feature extraction, bf16, against torch-fidelity", ratios(library, lambda: bf16.features(images), pairs))
    print(f"bf16 features differ by {error:.1e} of their largest; {bf16_fid(half, expected)}")


def bf16_fid(half: np.ndarray, full: np.ndarray) -> str:
    """How far apart bf16 puts the same images, beside how far apart two halves of them are."""
    moved = frechet_distance(Moments(DIMENSIONS).update(half).gaussian(), Moments(DIMENSIONS).update(full).gaussian())
    middle = len(full) // 2
    apart = frechet_distance(
        Moments(DIMENSIONS).update(full[:middle]).gaussian(), Moments(DIMENSIONS).update(full[middle:]).gaussian()
    )
    return f"Frechet distance of the same images in bf16 and float32: {moved:.2g} (two halves of them: {apart:.2g})"


def frechet(pairs: int) -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(DIMENSIONS, DIMENSIONS)) / np.sqrt(DIMENSIONS)
    scale = np.exp(0.5 * rng.normal(size=DIMENSIONS))
    sigmas = [
        np.cov(np.maximum(rng.normal(size=(ROWS, DIMENSIONS)) @ mixing + shift, 0) * scale, rowvar=False)
        for shift in (0.0, 0.1)
    ]
    mu = np.zeros(DIMENSIONS)

    def ours() -> float:
        return trace_of_root(Gaussian(mu, sigmas[0]), Gaussian(mu, sigmas[1]))

    def theirs() -> float:
        return float(np.trace(sqrtm(sigmas[0] @ sigmas[1])).real)

    error = abs(ours() / theirs() - 1)
    print(f"trace of the root differs by {error:.1e} (allowed: 1e-10)")
    assert error < 1e-10
    show(f"Frechet term at {DIMENSIONS} dimensions, against scipy.linalg.sqrtm", ratios(theirs, ours, pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--skip-compile", action="store_true")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {commit.stdout.strip()}"
    )
    frechet(arguments.pairs)
    extraction(arguments.pairs, arguments.batch, not arguments.skip_compile)


if __name__ == "__main__":
    main()
