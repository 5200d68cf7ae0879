"""What a person asks of a cache, and the plan that follows: checked whole before anything is written."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from xar_cli.cache.jobs import ConvertMar, EncodeImages, Job, open_images
from xar_cli.config import Config
from xar_cli.config.schema import Section
from xar_cli.data.cache_file import DTYPES, WRITTEN, CacheFile, CacheLayout, hash_source, leftovers
from xar_cli.data.images import CROP_RULE
from xar_cli.errors import UserError, did_you_mean
from xar_cli.run_dir import is_there, require_writable
from xar_cli.tokenizer import Codec, load_tokenizer
from xar_cli.tokenizer.kl16 import PRECISIONS

PIXEL_VALUES_PER_BATCH = 1 << 23  # default batch: 42 RGB images of 256 x 256
MAX_BATCH = 256
MAR_TOKENIZER = "kl16:mar"  # MAR's cache does not say which file of weights made it


class CacheSettings(Section):
    """What a person chooses for a cache; one object, that may travel to other processes as JSON."""

    images: Path = Field(description="Folder with one subfolder per class, or a .tar or .zip of one.")
    out: Path = Field(description="The cache file to make or to continue.")
    config: Config = Field(description="Recipe: image size, channels, tokenizer, classes.")
    from_mar: bool = Field(False, description="`images` is a cache of MAR, taken over without encoding.")
    tokenizer_weights: Path | None = Field(None, description="File of kl16's weights.")
    precision: str = Field("fp32", description="Arithmetic of kl16: fp32, bf16, and on a GPU tf32 or fp16.")
    flip: str = Field("encode", description="encode stores the mirror image too, none does not.")
    dtype: str = Field("float16", description="float16 or float32, as stored.")
    max_bad: int | None = Field(0, description="Unusable images to leave out before the end; None: any number.")
    batch_size: int | None = Field(None, description="Images encoded together; None: by image size.")
    workers: int | None = Field(None, description="Threads that decode; None: this process's share of the cores.")
    device: str = Field("auto", description="Where the tokenizer runs: auto, cpu, cuda or cuda:N.")

    def check(self) -> None:
        """Raise a UserError for a value that is not one of its choices."""
        for name, value, choices in (
            ("--flip", self.flip, ("encode", "none")),
            ("--dtype", self.dtype, DTYPES),
            ("--precision", self.precision, tuple(PRECISIONS)),
        ):
            if value not in choices:
                raise UserError(f"{name} cannot be '{value}'.", did_you_mean(value, choices))
        for name, number, least in (
            ("--batch-size", self.batch_size, 1),
            ("--workers", self.workers, 1),
            ("--max-bad", self.max_bad, 0),
        ):
            if number is not None and number < least:
                raise UserError(f"{name} cannot be {number}.", f"Give {least} or more.")


@dataclass(frozen=True)
class CachePlan:
    """What a run would do: all that is known before anything is written.

    Attributes:
        layout: what the cache will hold.
        num_classes: classes in it.
        batch_size: images encoded together.
        total_bytes: of the finished cache on disk.
        num_done: images that are stored already.
    """

    layout: CacheLayout
    num_classes: int
    batch_size: int
    total_bytes: int
    num_done: int

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for `--json`."""
        values = asdict(self.layout)
        return {
            "images": values.pop("num_samples"),
            "done": self.num_done,
            "classes": self.num_classes,
            "bytes": self.total_bytes,
            "batch_size": self.batch_size,
            **values,
        }


def make_plan(settings: CacheSettings, device: torch.device) -> tuple[CachePlan, Job]:
    """Check settings against the images, the recipe and the cache that may be there; writes nothing. What room the disk
    has is `require_room`'s.

    Returns:
        the plan, and what the rows are made from, open.

    Raises:
        UserError: images that cannot be listed, a class count other than the recipe's, missing weights, a
            cache of something else at `out`.
    """
    settings.check()
    config = settings.config
    job, tokenizer, precision = _open_job(settings, device)
    num_classes = len(job.class_names)
    if config.data.num_classes not in (0, num_classes):
        raise UserError(
            f"'{settings.images}' has {num_classes} classes, recipe '{config.name}' has {config.data.num_classes}.",
            f"Add --set data.num_classes={num_classes}, or choose the folder that holds the class folders.",
        )
    names = [os.fsencode(name) for name in job.names]
    layout = CacheLayout(
        num_samples=len(names),
        latent_channels=config.latent_channels,
        grid=config.grid,
        dtype=settings.dtype,
        flip=settings.flip == "encode",
        tokenizer=tokenizer,
        precision=precision,
        latent_scale=config.tokenizer.latent_scale,
        image_size=config.data.image_size,
        image_channels=config.data.image_channels,
        crop=CROP_RULE,
        source=hash_source(names, job.labels),
    )
    num_done, total_bytes = 0, layout.file_bytes(max(map(len, names)))
    if is_there(settings.out):
        there = CacheFile(settings.out)
        _refuse_other(settings.out, there.layout, layout)
        num_done = int(np.count_nonzero(there.states == WRITTEN))
    values = config.data.image_channels * math.prod(config.data.image_shape)
    batch_size = settings.batch_size or max(1, min(MAX_BATCH, PIXEL_VALUES_PER_BATCH // values))
    return CachePlan(layout, num_classes, batch_size, total_bytes, num_done), job


def require_room(out: Path, plan: CachePlan) -> None:
    """Raise a UserError unless the cache can be written at `out`, with all of its space where it is not there yet.

    One rank asks, before the file is made: while it is being made, others would see a disk that is full already.
    """
    left = sum(file.stat().st_blocks * 512 for file in leftovers(out) if file.exists())  # they go first
    require_writable(out.parent, 0 if out.exists() else max(0, plan.total_bytes - left), "the latent cache")


def _open_job(settings: CacheSettings, device: torch.device) -> tuple[Job, str, str]:
    """What rows are made from, the tokenizer's identity, and the arithmetic it encodes in."""
    config, weights, flip = settings.config, settings.tokenizer_weights, settings.flip == "encode"
    if settings.from_mar:
        if config.tokenizer.kind != "kl16":
            raise UserError(
                f"MAR's cache was made with kl16, recipe '{config.name}' has {config.tokenizer.kind}.",
                "Choose a recipe with the tokenizer kl16, such as base.",
            )
        job: Job = ConvertMar(settings.images, (2 * config.latent_channels, *config.grid), flip)
        identity = load_tokenizer(config, weights, torch.device("cpu")).identity if weights else MAR_TOKENIZER
        return job, identity, "fp32"
    source = open_images(settings.images)
    precision = settings.precision if config.tokenizer.kind == "kl16" else "fp32"
    tokenizer = load_tokenizer(config, weights, device, precision)
    tokenizer.expect("encode", len(source.names) * (2 if flip else 1) * math.prod(config.data.image_shape))
    codec = Codec(tokenizer, config.tokenizer.latent_scale)
    job = EncodeImages(source, codec, config.data.image_size, flip, device)
    return job, codec.tokenizer.identity, precision


def _refuse_other(path: Path, there: CacheLayout, wanted: CacheLayout) -> None:
    """Raise a UserError when the cache at `path` is one of something else than these settings would make."""
    have, want = asdict(there), asdict(wanted)
    different = [name for name in have if have[name] != want[name]]
    if "source" in different or "num_samples" in different:
        raise UserError(
            f"'{path}' is a latent cache of other images: {there.num_samples} there, {wanted.num_samples} here.",
            "Choose another --out, or give the folder that it was made from, unchanged.",
        )
    if different:
        listed = ", ".join(f"{name} {have[name]} (asked for: {want[name]})" for name in different)
        raise UserError(
            f"'{path}' is a latent cache made in another way: {listed}.",
            "Choose another --out, or the settings it was made with.",
        )
