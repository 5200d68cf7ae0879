"""What evaluation costs against the libraries: features against torch-fidelity's, the Frechet term against sqrtm.

    python -m benchmarks.evaluation --batch 16        # on a CPU

Random Inception weights (the time does not depend on them). Each comparison runs in pairs, A B B A, after a
warm-up, and A against A first as the noise floor; printed are the median ratio, the smallest and the largest. A
ratio is only printed after equal numbers were found in the same run; those of bf16 are near, and how near is printed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks import timing
from benchmarks.timing import CPU, pairs, positive, require_agreement, spread, spread_text
from xar_cli.errors import UserError
from xar_cli.evaluate.frechet import Gaussian, Moments, frechet_distance, trace_of_root
from xar_cli.evaluate.inception import InceptionV3
from xar_cli.evaluate.networks import TorchFidelityInception
from xar_cli.evaluate.weights import Weights

DIMENSIONS, ROWS = 2048, 6000
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # largest difference of a feature, of the largest feature
ROOT_TOLERANCE = 1e-10  # relative difference of the trace of the root


def show(name: str, ratios: list[float]) -> None:
    """Print some ratios."""
    print(f"{name}: {spread_text(spread(ratios))}, {len(ratios)} pairs")


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


def extraction(count: int, batch: int, compiled: bool) -> None:
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

    features = {"fp32": ours.features(images)["pool"], "bf16": bf16.features(images)["pool"]}
    expected = library()
    for name, found in features.items():
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        require_agreement(f"{name}: the features", difference, TOLERANCE[name])
        print(f"{name}: features differ by {difference:.1e} of their largest")
    print(bf16_fid(features["bf16"], expected))
    show("noise floor, torch-fidelity against itself", pairs(library, library, count))
    show("feature extraction, float32, against torch-fidelity", pairs(library, lambda: ours.features(images), count))
    show("feature extraction, bf16, against torch-fidelity", pairs(library, lambda: bf16.features(images), count))


def bf16_fid(half: np.ndarray, full: np.ndarray) -> str:
    """How far apart bf16 puts the same images, beside how far apart two halves of them are."""
    moved = frechet_distance(Moments(DIMENSIONS).update(half).gaussian(), Moments(DIMENSIONS).update(full).gaussian())
    middle = len(full) // 2
    apart = frechet_distance(
        Moments(DIMENSIONS).update(full[:middle]).gaussian(), Moments(DIMENSIONS).update(full[middle:]).gaussian()
    )
    return f"Frechet distance of the same images in bf16 and float32: {moved:.2g} (two halves of them: {apart:.2g})"


def frechet(count: int) -> None:
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

    difference = abs(ours() / theirs() - 1)
    require_agreement("The traces of the root", difference, ROOT_TOLERANCE)
    print(f"trace of the root differs by {difference:.1e}")
    show("noise floor, scipy.linalg.sqrtm against itself", pairs(theirs, theirs, count))
    show(f"Frechet term at {DIMENSIONS} dimensions, against scipy.linalg.sqrtm", pairs(theirs, ours, count))


@timing.command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=positive, default=5)
    parser.add_argument("--batch", type=positive, default=16, help="4 at least")
    parser.add_argument("--skip-compile", action="store_true")
    timing.add_clock_options(parser)
    options = parser.parse_args()
    device = timing.use_clock(options)
    if device != CPU:
        raise UserError("The libraries are compared with on a CPU.", "Leave --device away.")
    if options.batch < 4:
        raise UserError(f"--batch {options.batch} makes no distance of two halves.", "Give 4 or more.")
    print(", ".join(str(fact) for fact in timing.machine(options, device).values()))
    frechet(options.pairs)
    extraction(options.pairs, options.batch, not options.skip_compile)


if __name__ == "__main__":
    main()
