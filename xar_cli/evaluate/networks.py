"""The feature networks: 8-bit images in, named features out, each with the resize that belongs to it.

Owns how a network is built, made fast and run. Which protocol uses which is protocols.py.
Legend: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config as inductor_config

from xar_cli.errors import UserError
from xar_cli.evaluate import digits, inception
from xar_cli.evaluate.weights import Weights, find_weights
from xar_cli.logs import log
from xar_cli.precision import float32_arithmetic

Precision = Literal["fp32", "bf16"]
DIGITS, INCEPTION, INCEPTION_CLEAN, VGG16 = "digits", "inception", "inception-clean", "vgg16"


class FeatureNetwork:
    """One network on one device.

    Attributes:
        name: which network it is.
        resize: what happens to an image before it, in words.
        layers: name and width of each feature that it gives.
        weights_sha256: which weights.
        published: whether those are the published ones.
        input_size: (H, W) that images must have, or None for any.
        mixes_sizes: whether images of several sizes can go through, because each is resized alone.
        compiled: what runs in its place where it is compiled, for batches of one shape; else None.
    """

    name: str
    resize: str
    layers: ClassVar[Mapping[str, int]]
    input_size: tuple[int, int] | None = None
    mixes_sizes = False
    compiled: Callable[[Tensor], Sequence[Tensor]] | None = None

    def __init__(self, weights_sha256: str, published: bool, device: torch.device, precision: Precision) -> None:
        self.weights_sha256, self.published = weights_sha256, published
        self.device, self.precision = device, precision
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    @property
    def identity(self) -> str:
        """What a number from this network depends on."""
        return f"{self.name}/{self.resize}/{self.weights_sha256}/{self.precision}"

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """What is done to one (H, W, 3) uint8 image on the CPU, in a thread of its own: nothing."""
        return image

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of (B, H, W, 3) prepared images, each (B, width) float32."""
        with float32_arithmetic(self.precision):
            found = self.forward(torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2))
        return {name: value.float().cpu().numpy() for name, value in zip(self.layers, found, strict=True)}

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """Features of (B, 3, H, W) images, in the order of `layers`."""
        raise NotImplementedError


class DigitNetwork(FeatureNetwork):
    """The digit classifier; always in float32, since nothing is gained otherwise."""

    name, resize = DIGITS, "none (8 x 8)"
    layers: ClassVar[Mapping[str, int]] = {"pool": digits.FEATURES, "logits": digits.NUM_CLASSES}
    input_size = (digits.IMAGE_SIZE, digits.IMAGE_SIZE)

    def __init__(self, device: torch.device) -> None:
        super().__init__(digits.weights_sha256(), True, device, "fp32")
        self.net = digits.DigitFeatures(digits.EXTRACTOR_NAME, [str(digits.FEATURES), "logits"]).to(device)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """Feature layer and logits."""
        return self.net(images)


class TorchFidelityInception(FeatureNetwork):
    """torch-fidelity's Inception behind TensorFlow 1's bilinear resize."""

    name, resize = INCEPTION, "299 x 299, bilinear as TensorFlow 1"
    layers: ClassVar[Mapping[str, int]] = {
        "pool": inception.POOL_FEATURES,
        "logits": inception.LOGITS,
        "spatial": inception.SPATIAL_FEATURES,
    }

    def __init__(self, weights: Weights, device: torch.device, precision: Precision, compiled: bool) -> None:
        super().__init__(weights.sha256, weights.published, device, precision)
        net = inception.InceptionV3()
        net.load_state_dict(_load_state_dict(weights.path, net.state_dict()))
        net.eval().requires_grad_(False).fold_batch_norms()
        self.net = net.to(device, self.dtype).to(memory_format=torch.channels_last)
        self.compiled = torch.compile(self._resize_and_run) if compiled else None

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """Pool features, logits without bias, spatial features."""
        if self.compiled is not None:
            try:
                # On a CPU the weights become constants of the graph, in oneDNN's own order. As an option of
                # torch.compile this has no effect: it must be set while the graph is traced, in the first call.
                with inductor_config.patch(freezing=self.device.type == "cpu"):
                    return self.compiled(images)
            except TorchDynamoException as error:  # no C++ compiler on this machine, most likely
                log.warning(f"the network is not compiled: {str(error).strip().splitlines()[0]}")
                self.compiled = None
        return self._resize_and_run(images)

    def _resize_and_run(self, images: Tensor) -> Sequence[Tensor]:
        resized = inception.resize_like_tensorflow(images)
        return self.net(resized.to(self.dtype, memory_format=torch.channels_last))


class CleanFidInception(FeatureNetwork):
    """clean-fid's Inception, a TorchScript archive, behind its antialiased resize."""

    name, resize = INCEPTION_CLEAN, "299 x 299, bicubic, antialiased, as clean-fid"
    layers: ClassVar[Mapping[str, int]] = {"pool": inception.POOL_FEATURES}
    mixes_sizes = True

    def __init__(self, weights: Weights, device: torch.device, precision: Precision) -> None:
        super().__init__(weights.sha256, weights.published, device, precision)
        try:
            self.net = torch.jit.load(str(weights.path), map_location="cpu").eval().layers.to(device, self.dtype)
        except (RuntimeError, AttributeError) as error:
            raise UserError(
                f"'{weights.path}' does not hold clean-fid's Inception.", "Give the published file."
            ) from error

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Resize one image."""
        return inception.resize_like_clean_fid(image)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """Pool features."""
        return (self.net(((images - 128) / 128).to(self.dtype)).reshape(len(images), -1),)


class TorchFidelityVGG16(FeatureNetwork):
    """torch-fidelity's default network for precision and recall."""

    name, resize = VGG16, "224 x 224, bilinear as TensorFlow 1"
    layers: ClassVar[Mapping[str, int]] = {"pool": 4096}

    def __init__(self, weights: Weights, device: torch.device) -> None:
        super().__init__(weights.sha256, weights.published, device, "fp32")
        import torchvision
        from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

        shapes = torchvision.models.vgg16().state_dict()
        _load_state_dict(weights.path, shapes)  # torch-fidelity unpickles freely: only what is known to be a state dict
        self.net = FeatureExtractorVGG16("vgg16", ["fc2_relu"], str(weights.path)).to(device)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        """The last hidden layer."""
        return self.net(images.contiguous())


NETWORKS: Mapping[str, type[FeatureNetwork]] = {
    DIGITS: DigitNetwork,
    INCEPTION: TorchFidelityInception,
    INCEPTION_CLEAN: CleanFidInception,
    VGG16: TorchFidelityVGG16,
}


def build_network(
    name: str, weights: Weights | None, device: torch.device, precision: Precision = "fp32", compiled: bool = False
) -> FeatureNetwork:
    """A network by name.

    Args:
        weights: from `require_weights`; None for digits, whose weights ship with the package.
        compiled: run through torch.compile where that pays (torch-fidelity's Inception).
    """
    if name == DIGITS:
        return DigitNetwork(device)
    assert weights is not None
    if name == INCEPTION:
        return TorchFidelityInception(weights, device, precision, compiled)
    if name == INCEPTION_CLEAN:
        return CleanFidInception(weights, device, precision)
    return TorchFidelityVGG16(weights, device)


def require_weights(name: str, given: Sequence[Path], download: bool) -> Weights | None:
    """The weights of a network, None for digits; raises the UserError of `find_weights`."""
    return None if name == DIGITS else find_weights(name, given, download)


def _load_state_dict(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict from a file, without running anything in it, checked against the names and shapes expected."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler stumbles over
        raise UserError(f"'{path}' cannot be read as a state dict.", "Give the published file.") from error
    shapes = {name: tuple(value.shape) for name, value in state.items()} if isinstance(state, dict) else {}
    if shapes != {name: tuple(value.shape) for name, value in expected.items()}:
        raise UserError(f"'{path}' does not hold the weights of this network.", "Give the published file.")
    return state
