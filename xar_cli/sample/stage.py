"""`xar sample`: from weights to a folder of PNG files with a manifest that tells how to make them again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from xar_cli.config.schema import Config, Section
from xar_cli.distributed import Ranks, process_group
from xar_cli.errors import UserError
from xar_cli.logs import progress
from xar_cli.model import XAR, build_grouping
from xar_cli.precision import autocast, set_matmul_precision
from xar_cli.run_dir import require_writable, write_json
from xar_cli.sample.images import PngWriter, grid_image, image_path, is_whole
from xar_cli.sample.noise import AddressedNoise, balanced_label
from xar_cli.sample.plan import SamplingPlan
from xar_cli.sample.sampler import sample_latents
from xar_cli.tokenizer import Codec, load_tokenizer
from xar_cli.weights import load_weights

MANIFEST = "manifest.json"
MANIFEST_FORMAT = {"format": "xar-samples", "version": 1}


class SampleSettings(Section):
    """What `xar sample` was asked for; crosses the process border as JSON.

    Attributes:
        config: the recipe, with the sampling settings to use.
        weights: a file, a run folder or an hf:// name.
        ema: averaged weights (True) or raw ones, where the source has both.
        out: folder for the images.
        count: how many images.
        seed: of noise and labels.
        classes: labels to draw from, in turn.
        class_names: for the manifest.
        tokenizer_weights: file of KL-16's weights.
        device: auto, cpu, cuda or cuda:N.
    """

    config: Config
    weights: str
    ema: bool = True
    out: Path
    count: int
    seed: int = 0
    classes: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    tokenizer_weights: Path | None = None
    device: str = "auto"


def sample(settings: SampleSettings) -> dict[str, Any]:
    """Draw the images that are not there yet.

    Returns:
        What `--json` prints: the folder, counts, seconds, images per second.

    Raises:
        UserError: weights that do not fit, a folder made with other settings, a full disk (exit code 1).
    """
    with process_group(settings.device) as ranks:
        config, device = settings.config, ranks.device
        set_matmul_precision(config.train.precision)
        model, weights = load_weights(settings.weights, config, ema=settings.ema, device=device)
        codec = Codec(load_tokenizer(config, settings.tokenizer_weights, device), config.tokenizer.latent_scale)
        manifest = make_manifest(settings, weights.sha256)
        check_out(settings.out, manifest)
        if ranks.is_main:
            settings.out.mkdir(parents=True, exist_ok=True)
            write_json(settings.out / MANIFEST, manifest)
        ranks.barrier()
        mine = range(ranks.rank, settings.count, ranks.world_size)
        missing = [index for index in mine if not is_whole(image_path(settings.out, index))]
        began = time.monotonic()
        try:
            _draw(settings, manifest["labels"], missing, model, codec, ranks)
        except OSError as error:
            raise UserError(
                f"An image could not be written to '{settings.out}': {error}.",
                "What was made is whole: free some space, and the same command makes the rest.",
                exit_code=1,
            ) from None
        seconds = time.monotonic() - began
        return {
            "samples": str(settings.out),
            "manifest": str(settings.out / MANIFEST),
            "count": settings.count,
            "made": len(missing),
            "seconds": seconds,
            "images_per_second": len(missing) / seconds if missing else None,
        }


def _draw(
    settings: SampleSettings, labels: list[int], missing: list[int], model: XAR, codec: Codec, ranks: Ranks
) -> None:
    """Draw and write the images `missing`, batch after batch."""
    config = settings.config
    batch_size = config.sample.batch_size
    with (
        closing(PngWriter(settings.out)) as writer,
        progress(len(missing), "sample", enabled=ranks.is_main and bool(missing)) as bar,
    ):
        for start in range(0, len(missing), batch_size):
            indices = missing[start : start + batch_size]
            images = draw_images(
                config,
                model,
                codec,
                settings.seed,
                indices,
                [labels[index] for index in indices],
                ranks.device,
            )
            for index, image in zip(indices, images.cpu().numpy(), strict=True):
                writer.write(index, image)
            bar.update(len(indices))


def draw_images(
    config: Config,
    model: XAR,
    codec: Codec,
    seed: int,
    indices: list[int],
    labels: list[int],
    device: torch.device,
) -> torch.Tensor:
    """Images of the given indices and labels with the recipe's sampling settings: uint8 (B, channels, S, S)."""
    with autocast(config.train.precision, device):
        latents = sample_latents(
            model,
            torch.tensor(labels, device=device),
            AddressedNoise(seed, indices, config.latent_channels, device),
            SamplingPlan.of(config),
        )
    with torch.inference_mode():
        return codec.images(latents)


def make_manifest(settings: SampleSettings, weights_sha256: str) -> dict[str, Any]:
    """Everything that is needed to make the same images again."""
    config = settings.config
    labels = [balanced_label(settings.seed, index, settings.classes) for index in range(settings.count)]
    return {
        **MANIFEST_FORMAT,
        "recipe": config.name,
        "weights": settings.weights,
        "weights_sha256": weights_sha256,
        "ema": settings.ema,
        "seed": settings.seed,
        "solver": config.sample.solver,
        "num_steps": config.sample.num_steps,
        "guidance_scale": config.sample.guidance_scale,
        "image_size": config.data.image_size,
        "count": settings.count,
        "class_names": list(settings.class_names),
        "labels": labels,
        "config": config.model_dump(mode="json"),
    }


def describe_settings(settings: SampleSettings) -> list[tuple[str, str]]:
    """What would be done, as rows of a table for people; the folder is checked and nothing is written."""
    config = settings.config
    num_entities = build_grouping(config.entity, config.grid).num_entities
    return [
        ("recipe", config.name),
        ("weights", settings.weights),
        ("images", f"{settings.count} of {config.data.image_size} x {config.data.image_size} pixels"),
        ("classes", f"{len(settings.classes)}"),
        ("solver", f"{config.sample.solver}, {config.sample.num_steps} steps x {num_entities} entities"),
        ("guidance scale", f"{config.sample.guidance_scale:g}"),
        ("seed", str(settings.seed)),
        ("written to", str(settings.out)),
    ]


def check_out(out: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a folder that cannot take these images; nothing is written.

    Raises:
        UserError: the folder holds images made with other settings (the differences are named) or other files.
    """
    bytes_per_image = manifest["image_size"] ** 2 * 3 + 4096
    require_writable(out, manifest["count"] * bytes_per_image, "images")
    path = out / MANIFEST
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"'{out}' is not empty and has no {MANIFEST}.", "Give another --out.")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    ignored = ("count", "labels", "weights", "config")
    differences = [
        f"{key}: {there.get(key)} there, {value} here"
        for key, value in manifest.items()
        if key not in ignored and there.get(key) != value
    ]
    common = min(len(there["labels"]), manifest["count"])
    if there["labels"][:common] != manifest["labels"][:common]:
        differences.append("other labels")
    if manifest["count"] < there["count"]:
        differences.append(f"count: {there['count']} there, {manifest['count']} here")
    if differences:
        raise UserError(
            f"'{out}' holds images made with other settings: {'; '.join(differences)}.",
            "Give another --out, or the same settings to make what is missing.",
        )


def save_grid(folder: Path, count: int, columns: int, path: Path) -> None:
    """One picture of the first `count` images of a folder of samples."""
    images = []
    for index in range(count):
        with Image.open(image_path(folder, index)) as image:
            images.append(image.copy())
    path.parent.mkdir(parents=True, exist_ok=True)
    grid_image(images, columns).save(path)
