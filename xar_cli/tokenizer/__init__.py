"""Image <-> moments (kl16.py, pixels.py), moments <-> scaled latent (codec.py); which one a recipe has."""

from __future__ import annotations

from pathlib import Path

import torch

from xar_cli.config.schema import Config
from xar_cli.errors import UserError
from xar_cli.tokenizer.codec import Codec, sample_latents
from xar_cli.tokenizer.kl16 import ON_GPU_ONLY, load_kl16
from xar_cli.tokenizer.pixels import Pixels
from xar_cli.tokenizer.protocol import Tokenizer

__all__ = ["Codec", "Tokenizer", "load_tokenizer", "sample_latents"]


def load_tokenizer(
    config: Config,
    weights: str | Path | None,
    device: torch.device,
    precision: str = "fp32",
) -> Tokenizer:
    """The tokenizer that a recipe names, ready on a device.

    Args:
        config: the recipe.
        weights: file of KL-16's weights (`kl16.ckpt` or safetensors) or its `hf://` name; pixels need none.
        device: where kl16 runs; pixels run wherever their input is.
        precision: arithmetic of kl16, a name in `kl16.PRECISIONS`; its results are float32 in any case.

    Raises:
        UserError: kl16 without weights, weights that do not fit, weights for a tokenizer that has none, or a precision
            that the device does not have.
    """
    if config.tokenizer.kind == "pixels":
        if weights is not None:
            raise UserError(
                f"Recipe '{config.name}' has tokenizer 'pixels', which has no weights to load: '{weights}'.",
                "Leave --tokenizer-weights away, or choose a recipe with tokenizer kl16.",
            )
        return Pixels(config.tokenizer.patch, config.data.image_channels)
    if weights is None:
        raise UserError(
            f"Recipe '{config.name}' needs the weights of the tokenizer KL-16, the file kl16.ckpt (266 MB).",
            "Get it with `xar weights download kl16`, or from https://huggingface.co/xwen99/mar-vae-kl16; then "
            "give --tokenizer-weights.",
        )
    if device.type == "cpu" and precision in ON_GPU_ONLY:
        raise UserError(f"KL-16 in {precision} needs a GPU.", "Use fp32 or bf16, or another --device.")
    return load_kl16(weights, device, precision)
