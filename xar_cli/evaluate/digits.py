"""The network of the `digits` protocol: a small classifier of 8 x 8 digits, as a torch-fidelity extractor.

Owns the architecture and its shipped weights. It was trained on real digits alone
(benchmarks/train_digit_classifier.py) and never saw a generated image. B is the batch.
"""

from __future__ import annotations

import hashlib
from importlib import resources

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

EXTRACTOR_NAME = "xar-digits"
WEIGHTS_FILE = "digit_classifier.safetensors"
IMAGE_SIZE = 8
FEATURES = 32
NUM_CLASSES = 10


class DigitNet(nn.Module):
    """Four 3x3 convolutions, a feature layer of 32 values, a linear classifier; 43 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(),
            nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.features = nn.Linear(48 * 2 * 2, FEATURES)
        self.classifier = nn.Linear(FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features before their non-linearity, and class logits.

        Args:
            images: (B, 1, 8, 8) in [-1, 1], ink is 1.

        Returns:
            (B, 32) and (B, 10).
        """
        hidden = self.convolutions(images)  # (B, 48, 2, 2)
        features = self.features(hidden.flatten(1))  # (B, 32)
        return features, self.classifier(features.relu())  # fmt: skip


class DigitFeatures(FeatureExtractorBase):
    """DigitNet under torch-fidelity's interface, features named '32' and 'logits'.

    Takes (B, 1, 8, 8) or (B, 3, 8, 8) uint8: an RGB image counts as the grey image of its mean. No resize.
    """

    def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
        super().__init__(name, features_list)
        self.net = DigitNet()
        self.net.load_state_dict(load_safetensors(weights_bytes()))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The requested features, each (B, width) float32."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"expected (B, channels, 8, 8) uint8 images, got {tuple(images.shape)} {images.dtype}")
        grey = images.float().mean(dim=1, keepdim=True)
        features, logits = self.net(grey / 127.5 - 1)
        found = {str(FEATURES): features, "logits": logits}
        return tuple(found[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the features it can give."""
        return str(FEATURES), "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Logits for the Inception Score, the feature layer for the rest."""
        return "logits" if metric == "isc" else str(FEATURES)

    @staticmethod
    def can_be_compiled() -> bool:
        """It could be, and would not gain: a batch takes a few milliseconds."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """One black image."""
        return torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)


def weights_bytes() -> bytes:
    """The shipped safetensors file."""
    return (resources.files("xar_cli.evaluate") / WEIGHTS_FILE).read_bytes()


def weights_sha256() -> str:
    """Which classifier this is."""
    return hashlib.sha256(weights_bytes()).hexdigest()


if EXTRACTOR_NAME not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(EXTRACTOR_NAME, DigitFeatures)
