"""The KL-16 decoder in bf16 and channels-last against float32 as written: speed in pairs, and PSNR between the images.

    python -m benchmarks.decoder

Weights are seeded (the published file is not shipped), scaled to unit gain; 256 x 256 images, batch 1.
"""

from __future__ import annotations

import argparse
import json
import math

import torch

from benchmarks.sampling import add_clock_options, pairs, spread, use_clock
from xar_cli.tokenizer.codec import to_uint8
from xar_cli.tokenizer.kl16 import AutoencoderKL


def build(dtype: torch.dtype, channels_last: bool) -> AutoencoderKL:
    """The autoencoder with seeded weights: the same numbers whatever the dtype."""
    torch.manual_seed(0)
    network = AutoencoderKL().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
    return network.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 images, in dB."""
    error = (images.float() - reference.float()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    add_clock_options(parser)
    options = parser.parse_args()
    use_clock(options)
    plain, fast, exact = build(torch.float32, False), build(torch.bfloat16, True), build(torch.float32, True)
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    last = latents.contiguous(memory_format=torch.channels_last)
    reference = plain.decode(latents)
    contrast = 0.5 / reference.std()  # seeded weights make no image: bring it to the contrast of one
    images = {
        "bf16": fast.decode(last.bfloat16()).float(), "fp32_channels_last": exact.decode(last),
    }  # fmt: skip
    quality = {name: psnr(to_uint8(image * contrast), to_uint8(reference * contrast)) for name, image in images.items()}
    print(json.dumps({
        "threads": options.threads, "clock": options.clock, "torch": torch.__version__, "psnr_db": quality,
        "plain_against_itself": spread(pairs(lambda: plain.decode(latents), lambda: plain.decode(latents), 2)),
        "fp32_plain_over_bf16_channels_last": spread(
            pairs(lambda: plain.decode(latents), lambda: fast.decode(last.bfloat16()), options.pairs)
        ),
        "fp32_plain_over_fp32_channels_last": spread(
            pairs(lambda: plain.decode(latents), lambda: exact.decode(last), options.pairs)
        ),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
