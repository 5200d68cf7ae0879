"""Small image sets, and seeded random Inception weights in each library's own format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from xar_cli.data.digits import write_digits
from xar_cli.evaluate import evaluation
from xar_cli.evaluate.networks import INCEPTION, FeatureNetwork
from xar_cli.precision import float32_arithmetic


def make_images(count: int, size: int = 32, seed: int = 0, brightness: float = 1.0) -> np.ndarray:
    """(N, size, size, 3) uint8: coloured blobs and noise, unlike each other."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3))
    smooth = coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)
    noisy = 0.7 * smooth + 0.3 * rng.integers(0, 256, (count, size, size, 3))
    return (brightness * noisy).clip(0, 255).astype(np.uint8)


def write_folder(folder: Path, images: np.ndarray, suffix: str = ".png") -> Path:
    """Write images as 000000.png, ... and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:06d}{suffix}")
    return folder


@pytest.fixture(scope="session")
def digit_folders(tmp_path_factory) -> tuple[Path, Path]:
    """The train and held-out folders of the digits."""
    return write_digits(tmp_path_factory.mktemp("digits"))


@dataclass(frozen=True)
class InceptionFiles:
    """One random network, saved as torch-fidelity and as clean-fid keep it; the latter's folder is `clean.parent`."""

    torch_fidelity: Path
    clean: Path


class _Layers(nn.Module):
    """The part of clean-fid's archive that its wrapper calls: normalised images to pool features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)[0]


class _Archive(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layers = _Layers(net)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@pytest.fixture(scope="session")
def inception_files(tmp_path_factory) -> InceptionFiles:
    """Seeded random weights whose features differ from image to image."""
    from xar_cli.evaluate.inception import InceptionV3

    generator = torch.Generator().manual_seed(7)
    net = InceptionV3().eval().requires_grad_(False)
    for name, value in net.state_dict().items():
        if value.dim() >= 2:
            fan_in = value[0].numel()
            value.normal_(0, (2.0 / fan_in) ** 0.5, generator=generator)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1, generator=generator)
        elif name.endswith("bn.weight"):
            value.uniform_(0.8, 1.2, generator=generator)
    folder = tmp_path_factory.mktemp("inception")
    files = InceptionFiles(folder / "random-inception.pth", folder / "inception-2015-12-05.pt")
    torch.save(net.state_dict(), files.torch_fidelity)
    with float32_arithmetic("fp32"):  # a trace keeps for ever whether its convolutions may use TF32
        traced = torch.jit.trace(_Archive(net).eval(), torch.zeros(2, 3, 299, 299))
    torch.jit.save(traced, str(files.clean))
    return files


class FakeInception(FeatureNetwork):
    """Stands in for Inception where its cost is not the point: mean colours, patches and brightness as features."""

    name, resize = INCEPTION, "none"
    layers: ClassVar[dict[str, int]] = {"pool": 12, "logits": 5, "spatial": 6}

    def __init__(self, name: str = INCEPTION, mixes_sizes: bool = False, sha256: str = "fake") -> None:
        super().__init__(sha256, False, torch.device("cpu"), "fp32")
        self.name, self.mixes_sizes = name, mixes_sizes
        self.images_seen = 0

    def prepare(self, image: np.ndarray) -> np.ndarray:
        if not self.mixes_sizes:
            return image
        return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((16, 16)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.images_seen += len(images)
        pooled = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)  # (B, 12)
        return pooled, 20 * pooled[:, :5], pooled[:, 6:]


@pytest.fixture
def fake_networks(monkeypatch) -> dict[str, FakeInception]:
    """Every network but digits is a fake; weights are not looked for. The fakes that were built, by name."""
    built: dict[str, FakeInception] = {}
    real = evaluation.build_network

    def build(name: str, *arguments: object) -> FeatureNetwork:
        if name == "digits":
            return real(name, *arguments)
        built[name] = FakeInception(name, mixes_sizes=name == "inception-clean")
        return built[name]

    monkeypatch.setattr(evaluation, "build_network", build)
    monkeypatch.setattr(evaluation, "require_weights", lambda *_: None)
    return built
