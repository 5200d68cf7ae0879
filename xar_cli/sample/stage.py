"""`xar sample`: from weights to a folder of PNG files with a manifest that tells how to make them again."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from xar_cli.compiler import compile_pays
from xar_cli.config import Config, published_result
from xar_cli.device_memory import memory_for
from xar_cli.distributed import Ranks, process_group
from xar_cli.errors import UserError
from xar_cli.logs import log, progress
from xar_cli.model import XAR
from xar_cli.precision import autocast, set_matmul_precision
from xar_cli.run_dir import write_json
from xar_cli.sample.images import PngWriter, grid_image, load_images
from xar_cli.sample.labels import list_classes
from xar_cli.sample.manifest import MANIFEST, check_out, forget_if_empty, make_manifest, packs_to_write
from xar_cli.sample.network import SamplingNetwork, prepare_network
from xar_cli.sample.noise import AddressedNoise
from xar_cli.sample.packing import pack_path, patience_for, wait_for_images, write_pack
from xar_cli.sample.plan import SamplingPlan, flops_per_image
from xar_cli.sample.sampler import Observer, ignore, sample_latents
from xar_cli.sample.settings import SampleSettings
from xar_cli.stopping import stop_between_pieces
from xar_cli.tokenizer import Codec, load_tokenizer
from xar_cli.tokenizer.codec import to_uint8
from xar_cli.weights import open_weights
from xar_cli.weights.ranks import open_on_all

__all__ = ["MANIFEST", "SampleSettings", "describe_settings", "draw_images", "make_manifest", "sample"]


def sample(settings: SampleSettings) -> dict[str, Any]:
    """Draw the images that are not there yet; each process draws its own share, and waits for the others at the end.

    Returns:
        What `--json` prints: the folder, counts, seconds, images per second. Only rank 0 has something to say.

    Raises:
        UserError: weights that do not fit, a folder made with other settings; with exit code 1: a full disk, images
            that are not finite, damaged ones where a packed file or a grid reads them.
    """
    with process_group(settings.device) as ranks:
        weights, sha256 = open_on_all(
            settings.weights,
            lambda file: open_weights(file, settings.config, ema=settings.ema),
            ranks,
            ema=settings.ema,
        )
        codec = load_codec(settings, ranks.device)
        manifest = make_manifest(settings, sha256, codec.tokenizer.identity)
        missing = ranks.on_main(lambda: _open_out(settings, manifest))  # one list for all, before anybody writes
        mine = missing[ranks.rank :: ranks.world_size]
        seconds = slowest = 0.0
        with _disk_errors(settings.out):
            if mine:
                try:
                    network = load_network(settings.config, lambda: weights.load(ranks.device), len(mine))
                    expect_images(settings.config, codec, len(mine))
                    began = time.monotonic()
                    slowest = _draw(settings, manifest["labels"], mine, network, codec, ranks)
                except UserError:
                    if ranks.world_size == 1:
                        forget_if_empty(settings.out)
                    raise
                seconds = time.monotonic() - began
            if not ranks.is_main:
                return {}
            made = _pack(settings, manifest, bool(missing), patience_for(slowest))
            made |= _grid(settings, patience_for(slowest))
        speed = len(missing) / seconds if mine else None
        if speed is not None:
            log.info("%s: %.3g images/s", describe_speed(settings.config, ranks), speed)
        return {
            "samples": str(settings.out),
            "manifest": str(settings.out / MANIFEST),
            **made,
            "classes": _told_classes(settings),
            "count": settings.count,
            "made": len(missing),
            "seconds": seconds,
            "images_per_second": speed,
            "measured_with": describe_speed(settings.config, ranks),
        }


def batches(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in lists of `size`, the last one perhaps shorter."""
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


def _open_out(settings: SampleSettings, manifest: dict[str, Any]) -> list[int]:
    """Check the folder and write the manifest; the numbers of the missing images."""
    with _disk_errors(settings.out):
        missing = check_out(settings.out, manifest, settings.packs)
        settings.out.mkdir(parents=True, exist_ok=True)
        write_json(settings.out / MANIFEST, manifest)
    return missing


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """A disk that is full or gone is a UserError with exit code 1."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"A file could not be read or written in '{out}': {error}.",
            "What was made is whole: free some space, and the same command makes the rest.",
            exit_code=1,
        ) from None


def load_codec(settings: SampleSettings, device: torch.device) -> Codec:
    """The decoder, in the precision that the recipe asks for."""
    config = settings.config
    tokenizer = load_tokenizer(config, settings.tokenizer_weights, device, config.sample.decoder_precision)
    return Codec(tokenizer, config.tokenizer.latent_scale)


def expect_images(config: Config, codec: Codec, images: int) -> None:
    """Have the decoder ready for so many images: compiled where the recipe allows it and it pays."""
    if config.sample.compile:
        codec.tokenizer.expect("decode", images * math.prod(config.data.image_shape))


def ready_network(config: Config, model: XAR, images: int) -> SamplingNetwork:
    """The network prepared for drawing so many images: compiled where the recipe allows it and it pays."""
    set_matmul_precision(config.train.precision)
    work = images * flops_per_image(config, SamplingPlan.of(config))
    compiled = config.sample.compile and compile_pays(work, model.rope.device)
    return prepare_network(model, config.train.precision, compiled, recorded=config.sample.compile)


def load_network(config: Config, load: Callable[[], XAR], images: int) -> SamplingNetwork:
    """As `ready_network`, of a network that `load` puts on its device.

    Raises:
        UserError: as `load`, or it does not fit into the device's memory (exit code 1).
    """
    with memory_for("The network", _with_less_memory(config)):
        return ready_network(config, load(), images)


def _with_less_memory(config: Config) -> str:
    """How to draw where even one image does not fit."""
    wide = config.train.precision in ("fp32", "tf32")
    return "Draw on a larger device" + (", or with --set train.precision=bf16." if wide else ".")


def describe_speed(config: Config, ranks: Ranks) -> str:
    """What a number of images per second was measured with; without it the number means nothing."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    passes = SamplingPlan.of(config).evaluations()
    return (
        f"{ranks.world_size} x {device}, {config.train.precision}, batch {config.sample.batch_size}, "
        f"{passes.total} network evaluations an image ({passes.conditional} with its class, {passes.null} for guidance,"
        f" {passes.commits} for context), decoder in ({config.tokenizer.kind}, {config.sample.decoder_precision})"
    )


def _draw(
    settings: SampleSettings,
    labels: list[int],
    missing: list[int],
    network: SamplingNetwork,
    codec: Codec,
    ranks: Ranks,
) -> float:
    """Draw the images `missing`, batch after batch, while threads write those before; seconds of the slowest batch.

    On a GPU the next batch is queued before one is fetched, so that the device always has work.
    """
    config, slowest = settings.config, 0.0
    batch_size, ahead = config.sample.batch_size, 1 if ranks.device.type == "cuda" else 0
    queued: deque[tuple[list[int], Fetch, Fetch]] = deque()
    with (
        stop_between_pieces(signal.SIGINT) as stop,
        closing(PngWriter(settings.out)) as writer,
        progress(len(missing), "sample", enabled=ranks.is_main) as bar,
    ):

        def finish(indices: list[int], images: Fetch, finite: Fetch) -> None:
            _require_finite(finite(), indices, config)
            for index, image in zip(indices, images().numpy(), strict=True):
                writer.write(index, image)
            bar.update(len(indices))

        for indices in batches(missing, batch_size):
            stop()
            began = time.monotonic()
            images, finite = queue_images(
                config, network, codec, settings.seed, indices, [labels[index] for index in indices], ranks.device
            )
            queued.append((indices, fetch(images), fetch(finite)))
            last = indices[-1] == missing[-1]
            while len(queued) > (0 if last else ahead):
                finish(*queued.popleft())
            slowest = max(slowest, time.monotonic() - began)
    return slowest


Fetch = Callable[[], torch.Tensor]


def fetch(tensor: torch.Tensor) -> Fetch:
    """Begin to copy a tensor to the host; what waits for it, and for nothing that is queued later."""
    host = tensor.to("cpu", non_blocking=True)
    if not tensor.is_cuda:
        return lambda: host
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return host

    return wait


def draw_images(
    config: Config,
    network: SamplingNetwork,
    codec: Codec,
    seed: int,
    indices: list[int],
    labels: list[int],
    device: torch.device,
    observe: Observer = ignore,
    must_be_finite: bool = True,
) -> torch.Tensor:
    """Images of the given indices and labels with the recipe's sampling settings.

    Returns:
        uint8 (B, channels, height, width).

    Raises:
        UserError: `must_be_finite`, and latents or pixels of some images are not (exit code 1).
    """
    images, finite = queue_images(config, network, codec, seed, indices, labels, device, observe)
    if must_be_finite:
        _require_finite(finite, indices, config)
    return images


@torch.inference_mode()
def queue_images(
    config: Config,
    network: SamplingNetwork,
    codec: Codec,
    seed: int,
    indices: list[int],
    labels: list[int],
    device: torch.device,
    observe: Observer = ignore,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `draw_images`, without waiting for a GPU: uint8 images, and which of them (B,) were finite before."""
    noise = AddressedNoise(seed, indices, config.latent_channels, device)
    classes = torch.tensor(labels).to(device, non_blocking=True)
    several = len(indices) > 1
    with memory_for(
        f"Drawing {len(indices)} images at a time" if several else "Drawing an image",
        "Lower --batch-size, or --set sample.batch_size." if several else _with_less_memory(config),
    ):
        with autocast(config.train.precision, device):
            latents = sample_latents(network, classes, noise, SamplingPlan.of(config), observe)
        pixels = codec.decode(latents)
        finite = [torch.isfinite(values).flatten(1).all(dim=1) for values in (latents, pixels)]
        return to_uint8(pixels), finite[0] & finite[1]


def _require_finite(finite: torch.Tensor, indices: list[int], config: Config) -> None:
    if finite.all():
        return
    bad = [str(index) for index, good in zip(indices, finite.tolist(), strict=True) if not good]
    named = ", ".join(bad[:10]) + (", ..." if len(bad) > 10 else "")
    narrow = "`--set sample.decoder_precision=fp32`, " if config.sample.decoder_precision == "fp16" else ""
    raise UserError(
        f"Images came out infinite or not a number: {named}.",
        f"Try {narrow}`--set train.precision={'fp32' if config.train.precision == 'bf16' else 'bf16'}` or a lower "
        "--guidance-scale; otherwise the weights are at fault.",
        exit_code=1,
    )


def _pack(settings: SampleSettings, manifest: dict[str, Any], fresh: bool, patience: float) -> dict[str, str]:
    """Make the packed files that were asked for, once all images are there; what `--json` prints of them."""
    wanted = packs_to_write(settings.out, manifest, settings.packs, fresh)
    if wanted:
        wait_for_images(settings.out, settings.count, patience=patience)
    for pack in wanted:
        write_pack(settings.out, manifest, pack)
    return {pack: str(pack_path(settings.out, pack)) for pack in settings.packs}


def _grid(settings: SampleSettings, patience: float) -> dict[str, str]:
    """Make the picture of the first images, once they are there; what `--json` prints of it."""
    if settings.grid is None:
        return {}
    columns, rows = settings.grid
    wait_for_images(settings.out, columns * rows, patience=patience)
    path = settings.picture or settings.out.with_name(f"{settings.out.name}-grid.png")
    save_picture(grid_image(list(load_images(settings.out, range(columns * rows))), columns), path)
    return {"grid": str(path)}


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture for people.

    Raises:
        UserError: it cannot be written (exit code 1).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The picture '{path}' could not be written: {error}.", "Free some space or name another file.", exit_code=1
        ) from None


def _told_classes(settings: SampleSettings) -> str:
    return list_classes(settings.classes, settings.class_names) if settings.config.data.num_classes else "none"


def describe_settings(settings: SampleSettings) -> list[tuple[str, str]]:
    """What would be done, as rows of a table for people; nothing is written."""
    config, plan = settings.config, SamplingPlan.of(settings.config)
    passes = plan.evaluations()
    steps = " + ".join(map(str, plan.num_steps)) if len(plan.num_steps) <= 8 else f"{sum(plan.num_steps)}"
    low, high = plan.interval
    guidance = f"scale {config.sample.guidance_scale:g}, {config.sample.guidance_schedule}, t from {low:g} to {high:g}"
    published = published_result(config)
    speed = published.images_per_second if published is not None else None
    rows = [
        ("recipe", config.name),
        ("weights", settings.weights),
        ("images", f"{settings.count} of {config.data.size_text}"),
        ("classes", _told_classes(settings)),
        ("solver", f"{plan.solver}, {steps} steps in {len(plan.num_steps)} entities"),
        ("guidance", guidance if config.data.num_classes else "none"),
        ("network evaluations", f"{passes.total} an image, {passes.null} of them for guidance"),
        ("work", f"{flops_per_image(config, plan) / 1e12:.3g} TFLOP an image, decoder not counted"),
        ("published speed", f"{speed:g} images/s on one A100, batch 128, 50 steps" if speed else ""),
        ("seed", str(settings.seed)),
        ("written to", str(settings.out)),
    ]
    return [(key, value) for key, value in rows if value]
