"""KL-16's decoder and encoder in half precision and channels-last against float32 as written: speed, and how far apart.

    python -m benchmarks.decoder                        # the decoder, batch 1
    python -m benchmarks.decoder --encoder --device cuda    # and the encoder, batch 64

Weights are seeded (the published file is not shipped), scaled to unit gain; 256 x 256 images. How far apart is told as
PSNR of the decoder's images, and relative to the norm of the encoder's moments, before any speed is printed. Float32 is
float32: TF32, which the convolutions of a GPU have by default, is switched off; what the float32 code does with it is
measured last, on its own. On a GPU the fast ones are compiled, as `xar sample` does it in a long job, and fp16 stands
beside bf16.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.timing import CPU, Timed, pairs, positive, require_agreement, say, spread, spread_text
from xar_cli.tokenizer.codec import to_uint8
from xar_cli.tokenizer.kl16 import AutoencoderKL, CompiledForOneShape

BATCH = {"cpu": 1, "cuda": 64}
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_PSNR = {"fp32": 60.0, "fp16": 50.0, "bf16": 40.0}  # dB, of images beside those of float32 as written
ENCODER_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}  # relative distance of the moments


def build(dtype: torch.dtype, channels_last: bool, device: torch.device = CPU) -> AutoencoderKL:
    """The autoencoder with seeded weights: the same numbers whatever the dtype and device."""
    torch.manual_seed(0)
    network = AutoencoderKL().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return network.to(device, dtype).to(memory_format=memory_format)


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 images, in dB."""
    error = (images.float() - reference.float()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def require_quality(precision: str, images: Tensor, reference: Tensor) -> float:
    """PSNR of decoded images, in dB; ends the benchmark where it is too low.

    Seeded weights make no image: both are brought to the contrast of one.
    """
    contrast = 0.5 / reference.std()
    found = psnr(to_uint8(images.float() * contrast), to_uint8(reference * contrast))
    if not found >= LEAST_PSNR[precision]:
        least = LEAST_PSNR[precision]
        raise SystemExit(f"{precision}: the images have {found:.1f} dB, {least:g} at least: no speed is printed.")
    return found


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may compute float32 convolutions in TF32."""
    torch.backends.cudnn.allow_tf32 = allowed


def half_of(run: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a half-precision network gives for float32 input."""
    return run(x.to(dtype))


def compare(networks: dict[str, Callable[[], Tensor]], batch: int, count: int, on_gpu: bool) -> dict[str, Any]:
    """Speeds of `plain` and the others on one batch; what they give has been compared."""
    timed = {name: Timed(run) for name, run in networks.items()}
    for run in networks.values():  # warm-up
        run()
    result: dict[str, Any] = {
        "plain_against_itself": spread(pairs(networks["plain"], networks["plain"], count)),
        **{
            f"fp32_plain_over_{name}": spread(pairs(timed["plain"], timed[name], count))
            for name in networks
            if name != "plain"
        },
    }
    result["images_per_second"] = {name: batch / one.median for name, one in timed.items()}
    if on_gpu:
        allow_tf32(True)
        plain_tf32 = Timed(networks["plain"])
        networks["plain"]()
        result["tf32_plain_over_bf16"] = spread(pairs(plain_tf32, networks["bf16"], count))
        result["images_per_second"]["plain_tf32"] = batch / plain_tf32.median
        allow_tf32(False)
    return result


def summary(name: str, found: dict[str, Any]) -> str:
    """One line for people."""
    speeds = found["images_per_second"]
    line = f"{name} as written in float32 {speeds['plain']:.1f} images/s"
    for half in HALVES:
        if half in speeds:
            line += f", {half} {speeds[half]:.1f}: {spread_text(found[f'fp32_plain_over_{half}'])}"
    if "plain_tf32" in speeds:
        line += f", with TF32 {speeds['plain_tf32']:.1f}"
    return line


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=positive, default=5)
    parser.add_argument("--batch", type=positive, help="default: 1 on a CPU, 64 on a GPU")
    parser.add_argument("--encoder", action="store_true", help="measure the encoder too")
    timing.add_clock_options(parser)
    return parser


@timing.command
@torch.inference_mode()
def main() -> None:
    options = parser().parse_args()
    device = timing.use_clock(options)
    batch, on_gpu = options.batch or BATCH[device.type], device.type == "cuda"
    allow_tf32(False)
    plain, exact = build(torch.float32, False, device), build(torch.float32, True, device)
    dtypes = HALVES if on_gpu else {"bf16": torch.bfloat16}
    fast = {name: build(dtype, True, device) for name, dtype in dtypes.items()}
    decode, encode = (
        {
            name: CompiledForOneShape(getattr(network, way)) if on_gpu else getattr(network, way)
            for name, network in fast.items()
        }
        for way in ("decode", "encode")
    )
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 16, 16, 16, generator=rng).to(device)
    last = latents.contiguous(memory_format=torch.channels_last)
    result: dict[str, Any] = {**timing.machine(options, device), "batch": batch, "tf32": False}

    reference = plain.decode(latents)
    result["psnr_db"] = {
        "fp32_channels_last": require_quality("fp32", exact.decode(last), reference),
        **{name: require_quality(name, decode[name](last.to(dtype)), reference) for name, dtype in dtypes.items()},
    }
    say(f"PSNR of the decoder's images: {result['psnr_db']}")
    del reference
    decoders: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain.decode(latents),
        "fp32_channels_last": lambda: exact.decode(last),
        **{name: partial(half_of, decode[name], last, dtype) for name, dtype in dtypes.items()},
    }
    result |= compare(decoders, batch, options.pairs, on_gpu)
    quality = ", ".join(f"{name} {result['psnr_db'][name]:.1f} dB" for name in dtypes)
    lines = [f"{summary('decoder', result)} ({quality})"]
    if options.encoder:
        pictures = (torch.rand(batch, 3, 256, 256, generator=rng) * 2 - 1).to(device)
        last_pictures = pictures.contiguous(memory_format=torch.channels_last)
        encoders: dict[str, Callable[[], Tensor]] = {
            "plain": lambda: plain.encode(pictures),
            "fp32_channels_last": lambda: exact.encode(last_pictures),
            **{name: partial(half_of, encode[name], last_pictures, dtype) for name, dtype in dtypes.items()},
        }
        expected, differences = encoders["plain"](), {}
        for name in ("fp32_channels_last", *dtypes):
            differences[name] = timing.distance(encoders[name]().float(), expected)
            tolerance = ENCODER_TOLERANCE[name.removesuffix("_channels_last")]
            require_agreement(f"{name}: the encoder's moments", differences[name], tolerance)
        result["encoder"] = {
            "relative_difference": differences,
            **compare(encoders, batch, options.pairs, on_gpu),
        }
        lines.append(summary("encoder", result["encoder"]))
    if on_gpu:
        timing.forget_peak(device)
        decoders["bf16"]()
        result["decoder_memory"] = timing.peak_memory(device)
    print(json.dumps({**result, "summary": "; ".join(lines)}, indent=2))


if __name__ == "__main__":
    main()
