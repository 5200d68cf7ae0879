"""Caching latents: is the stage bound by the tokenizer alone, and what do bf16 and channels_last give the encoder?

    python -m benchmarks.caching                      # KL-16 at 256 x 256 on this machine's device
    python -m benchmarks.caching --images 48 --size 256 --pairs 5

Images are JPEGs of photographs' size (500 x 375) with seeded noise over seeded gradients; KL-16 has seeded
weights, so its numbers mean nothing and its time is the real one. The pure encoder runs on images that lie
decoded in memory, in the same batches, both mirror images. In turns A B B A; median ratio of the pairs,
smallest and largest beside it. Moments in bf16, and those of the plain order of memory, are compared with those in
float32 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import timing
from benchmarks.decoder import ENCODER_TOLERANCE
from benchmarks.timing import in_turns
from xar_cli.cache import CacheSettings, cache_latents
from xar_cli.cache.jobs import EncodeImages
from xar_cli.cache.pipeline import BadList, encode_blocks
from xar_cli.cache.stage import plan_cache, share_of_blocks
from xar_cli.config import Config, load_recipe
from xar_cli.data.cache_file import create_cache
from xar_cli.data.images import ImageFolder
from xar_cli.data.latents import LatentWriter
from xar_cli.errors import UserError
from xar_cli.logs import progress
from xar_cli.precision import float32_arithmetic
from xar_cli.tokenizer import Codec, Tokenizer, load_tokenizer
from xar_cli.tokenizer.kl16 import build_on_meta


def write_images(root: Path, count: int) -> None:
    """JPEGs of 500 x 375 in two classes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:375, :500]
    for i in range(count):
        slopes = rng.uniform(-0.5, 0.5, (3, 2))
        smooth = np.stack([128 + a * (x - 250) + b * (y - 187) for a, b in slopes], axis=-1)
        pixels = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        path = root / f"class-{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def write_weights(path: Path) -> None:
    """KL-16's weights from a seed, of unit gain, under their published names."""
    rng = np.random.default_rng(11)
    state = {}
    for name, tensor in sorted(build_on_meta().state_dict().items()):
        values = rng.standard_normal(tuple(tensor.shape), dtype=np.float32)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif name.endswith("bias"):
            values = 0.1 * values
        else:
            values = values / math.sqrt(math.prod(tensor.shape[1:]))
        state[name] = torch.from_numpy(np.asarray(values, np.float32))
    save_file(state, path)


def measure(
    folder: Path, recipe: Config, count: int, batch: int, pairs: int, device: torch.device, memory_images: int
) -> dict[str, object]:
    """All figures."""
    weights, root = folder / "kl16.safetensors", folder / "images"
    write_weights(weights)
    write_images(root, count)
    job = _job(recipe, weights, root, device, "fp32")
    items = [
        np.stack([job.load(row) for row in range(start, min(start + batch, count))]) for start in range(0, count, batch)
    ]

    def pure(codec_job: EncodeImages, blocks: list[np.ndarray] = items) -> float:
        start = time.perf_counter()
        for block in blocks:
            moments = codec_job.encode(block)
        moments[-1].cpu()
        return sum(map(len, blocks)) / (time.perf_counter() - start)

    turn, names = iter(range(10_000)), [os.fsencode(name) for name in job.names]
    settings = CacheSettings(
        images=root,
        out=folder / "none.h5",
        config=recipe,
        tokenizer_weights=weights,
        batch_size=batch,
        device=str(device),
    )
    plan = plan_cache(settings)

    def stage() -> float:
        """The stage's work, from the first image to the last commit, without loading the tokenizer."""
        out = folder / f"latents-{next(turn)}.h5"
        create_cache(out, plan.layout, names, job.labels, [b"class-0", b"class-1"])
        start = time.perf_counter()
        with LatentWriter(out) as writer, progress(count, "caching", enabled=False) as display:
            blocks = share_of_blocks(writer, batch, 0, 1)
            encode_blocks(job, blocks, writer, BadList(folder / "bad", 0), display, os.cpu_count() or 1)
        return count / (time.perf_counter() - start)

    half, one = _job(recipe, weights, root, device, "bf16"), items[:1]
    exact, rounded = job.encode(items[0])[0].float().cpu(), half.encode(items[0])[0].float().cpu()
    for name, found in (("fp32", _contiguous(job.codec.tokenizer, one)[1]), ("bf16", rounded)):
        timing.require_agreement(f"{name}: the moments", timing.distance(found, exact), ENCODER_TOLERANCE[name])
    results: dict[str, object] = {
        "noise floor: encoder against encoder": in_turns(lambda: pure(job), lambda: pure(job), pairs, True),
        "stage against pure encoder, fp32": in_turns(stage, lambda: pure(job), pairs, True),
        "encoder bf16 against fp32": in_turns(lambda: pure(half, one), lambda: pure(job, one), pairs, True),
        "encoder fp32, channels_last against contiguous": in_turns(
            lambda: pure(job, one), lambda: _contiguous(job.codec.tokenizer, one)[0], pairs, True
        ),
    }
    results["moments in bf16 against fp32"] = error_of(rounded, exact)
    results["moments stored in float16"] = error_of(exact.half().float(), exact)
    results["moments stored in bfloat16"] = error_of(exact.bfloat16().float(), exact)
    if memory_images:
        results["memory over a run"] = memory_over_a_run(folder, root, memory_images)
    start = time.perf_counter()
    for row in range(count):
        job.load(row)
    results["decode on one core, images/s"] = count / (time.perf_counter() - start)
    return results


def memory_over_a_run(folder: Path, images: Path, count: int) -> dict[str, float]:
    """Resident memory while the stage decodes, queues and writes `count` images, without an encoder."""
    linked = folder / "linked"
    files = sorted(images.rglob("*.jpg"))
    for i in range(count):
        target = linked / f"class-{i % 2}" / f"{i:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(files[i % len(files)], target)
    recipe = load_recipe("base", ["data.num_classes=2", "tokenizer={kind: pixels, patch: 16, latent_scale: 1.0}"])
    seen: list[tuple[float, float]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((time.perf_counter(), pages * os.sysconf("SC_PAGE_SIZE")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        summary = cache_latents(linked, folder / "memory.h5", recipe, device="cpu", batch_size=32)
    finally:
        ended.set()
        watcher.join()
    times, held = np.array(seen).T
    steady = times > start + 0.3 * (times[-1] - start)  # past the first fill of queues and caches
    rate = summary.num_encoded / summary.seconds
    slope = np.polyfit(times[steady], held[steady], 1)[0] / rate
    return {"images": count, "images_per_s": rate, "bytes_per_image": float(slope), "held_bytes": float(held[-1])}


def error_of(moments: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Errors of the mean, relative to its standard deviation, and of the log-variance, absolute."""
    (mean, logvar), (mean_exact, logvar_exact) = moments.chunk(2, 1), exact.chunk(2, 1)
    return {
        "mean_rms_over_std": float((mean - mean_exact).square().mean().sqrt() / mean_exact.std()),
        "mean_max_over_std": float((mean - mean_exact).abs().max() / mean_exact.std()),
        "logvar_rms": float((logvar - logvar_exact).square().mean().sqrt()),
        "logvar_max": float((logvar - logvar_exact).abs().max()),
    }


def _job(recipe: Config, weights: Path, root: Path, device: torch.device, precision: str) -> EncodeImages:
    codec = Codec(load_tokenizer(recipe, weights, device, precision), recipe.tokenizer.latent_scale)
    return EncodeImages(ImageFolder(root), codec, recipe.data.image_size, True, device)


@float32_arithmetic("fp32")
def _contiguous(tokenizer: Tokenizer, blocks: list[np.ndarray]) -> tuple[float, torch.Tensor]:
    """Images per second of the same network with the plain order of memory, and the moments of the first block."""
    network = tokenizer.network.to(memory_format=torch.contiguous_format)  # type: ignore[attr-defined]
    first: list[torch.Tensor] = []
    start = time.perf_counter()
    with torch.inference_mode():
        for block in blocks:
            images = torch.from_numpy(block).to(tokenizer.device).float() / 127.5 - 1  # type: ignore[attr-defined]
            for view in (images, images.flip(-1)):
                moments = network.encode(view.contiguous())
                first = first or [moments]
        moments.cpu()
    rate = sum(map(len, blocks)) / (time.perf_counter() - start)
    network.to(memory_format=torch.channels_last)
    return rate, first[0].cpu()


@timing.command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=timing.positive, default=24, help="in one turn")
    parser.add_argument("--size", type=timing.positive, default=256, help="a multiple of 128")
    parser.add_argument("--batch", type=timing.positive, default=4)
    parser.add_argument("--pairs", type=timing.positive, default=5)
    parser.add_argument("--memory-images", type=int, default=4000, help="in the run that memory is watched over")
    timing.add_clock_options(parser, device="auto")
    options = parser.parse_args()
    device = timing.use_clock(options)
    if options.images < 2 or options.memory_images == 1:
        raise UserError("One image does not make the two classes of this benchmark.", "Give two at least.")
    recipe = timing.recipe_with("base", [f"data.image_size={options.size}"], ["data.num_classes=2"])
    with tempfile.TemporaryDirectory() as folder:
        results = measure(
            Path(folder), recipe, options.images, options.batch, options.pairs, device, options.memory_images
        )
    chosen = {"images": options.images, "size": options.size, "batch": options.batch, "rates": "images/s"}
    print(json.dumps({**timing.machine(options, device), **chosen, "results": results}, indent=2))


if __name__ == "__main__":
    main()
