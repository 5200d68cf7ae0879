"""The evaluation itself: images against a reference, by named protocols, to numbers that say what they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xar_cli.errors import UserError
from xar_cli.evaluate.digits import EXTRACTOR_NAME, FEATURES, IMAGE_SIZE, DigitFeatures
from xar_cli.evaluate.frechet import frechet_distance
from xar_cli.evaluate.images import ImageSet, open_images

BATCH = 250


@dataclass(frozen=True)
class Evaluation:
    """What came out, and of what.

    Attributes:
        protocol: how it was measured.
        samples, reference: what was measured, and against what.
        count, reference_count: images on either side.
        frechet_distance: between the feature Gaussians of samples and reference; 0 is best.
        class_accuracy: share of samples that the protocol's classifier puts in the class they were asked to be; None
            where labels are not known.
    """

    protocol: str
    samples: str
    reference: str
    count: int
    reference_count: int
    frechet_distance: float
    class_accuracy: float | None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


def evaluate(samples: Path | ImageSet, reference: Path | ImageSet, protocol: str = "digits") -> Evaluation:
    """Measure `samples` against `reference`.

    Raises:
        UserError: either cannot be read or does not fit the protocol, or the protocol is not known.
    """
    if protocol != "digits":
        raise UserError(f"There is no protocol '{protocol}'.", "Choose: digits.")
    opened, opened_reference = open_images(samples), open_images(reference)
    features, logits = _digit_features(opened)
    reference_features, _ = _digit_features(opened_reference)
    accuracy = None if opened.labels is None else float((logits.argmax(axis=1) == opened.labels).mean())
    return Evaluation(
        protocol, opened.name, opened_reference.name, len(opened), len(opened_reference),
        frechet_distance(*_moments(features), *_moments(reference_features)), accuracy,
    )  # fmt: skip


def _digit_features(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    if len(images) < 2:
        raise UserError(
            f"'{images.name}' holds one image.", "A distance between distributions needs two at least."
        )
    extractor = DigitFeatures(EXTRACTOR_NAME, [str(FEATURES), "logits"])
    pixels = np.stack([_load_digit(images, index) for index in range(len(images))])
    found = [extractor(batch) for batch in torch.from_numpy(pixels).permute(0, 3, 1, 2).split(BATCH)]
    features, logits = (torch.cat(parts).double().numpy() for parts in zip(*found, strict=True))
    return features, logits


def _load_digit(images: ImageSet, index: int) -> np.ndarray:
    image = images.load(index)
    if image.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(
            f"{images.item_name(index)} has {image.shape[1]} x {image.shape[0]} pixels.",
            "The digits protocol takes 8 x 8 images as they are; choose another --protocol for other images.",
        )
    return image


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(axis=0), np.cov(features, rowvar=False)
