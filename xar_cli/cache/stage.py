"""`xar cache-latents`: images to a latent cache, from the plan to the summary.

The stage can be run again at any time: what is stored stays, what is missing is made. Flow of work:
pipeline.py; the file: data/latents.py.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from xar_cli.cache.jobs import ConvertMar, EncodeImages, Job, open_images
from xar_cli.cache.lock import CacheLock
from xar_cli.cache.pipeline import BadList, Block, encode_blocks
from xar_cli.config import Config
from xar_cli.data.cache_file import (
    BAD,
    DTYPES,
    WRITTEN,
    CacheFile,
    CacheLayout,
    create_cache,
    hash_source,
)
from xar_cli.data.imagenet import class_title
from xar_cli.data.images import CROP_RULE, printable
from xar_cli.data.latents import LatentWriter
from xar_cli.distributed import Ranks, pick_device
from xar_cli.errors import UserError, did_you_mean
from xar_cli.logs import log, progress
from xar_cli.run_dir import require_writable
from xar_cli.tokenizer import Codec, load_tokenizer

PIXEL_VALUES_PER_BATCH = 1 << 23  # default batch: 42 RGB images of 256 x 256
MAX_BATCH = 256
MAR_TOKENIZER = "kl16:mar"  # MAR's cache does not say which file of weights made it
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CacheSettings:
    """What a person chooses for a cache, beside the recipe.

    Attributes:
        images: folder with one subfolder per class, or a `.tar` or `.zip` of one.
        out: the cache file to make or to continue.
        from_mar: `images` is a cache of MAR, to be taken over without encoding.
        tokenizer_weights: file of kl16's weights.
        precision: arithmetic of the encoder, fp32 or bf16; pixels are always encoded in fp32.
        flip: `encode` stores the mirror image too, `none` does not.
        dtype: float16 or float32, as stored.
        max_bad: how many unusable images are left out before the work ends; None for any number.
        batch_size: images encoded together; None chooses by image size.
        workers: threads that decode; None takes one per core.
    """

    images: Path
    out: Path
    from_mar: bool = False
    tokenizer_weights: Path | None = None
    precision: str = "fp32"
    flip: str = "encode"
    dtype: str = "float16"
    max_bad: int | None = 0
    batch_size: int | None = None
    workers: int | None = None

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
    """What a run would do: all that is known before anything is written."""

    settings: CacheSettings
    layout: CacheLayout
    num_classes: int
    batch_size: int
    total_bytes: int
    num_done: int

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for `--json`."""
        return {
            "out": str(self.settings.out),
            "images": self.layout.num_samples,
            "classes": self.num_classes,
            "done": self.num_done,
            "batch_size": self.batch_size,
            "bytes": self.total_bytes,
            **{key: value for key, value in asdict(self.layout).items() if key != "num_samples"},
        }


@dataclass(frozen=True)
class CacheSummary:
    """What is in a cache after a run.

    Attributes:
        path: the cache file.
        num_samples: usable samples in it.
        num_bad: images that were left out.
        num_missing: images not done yet; 0 for a finished cache.
        num_classes: classes.
        bytes: size of the rows on disk.
        content_hash: identity of the data.
        rounding_rms, rounding_max: what storing in `dtype` changed, root mean square and at most, in units of
            the moments.
        num_encoded: images that this process encoded in this run.
        seconds: how long it took.
    """

    path: Path
    num_samples: int
    num_bad: int
    num_missing: int
    num_classes: int
    dtype: str
    bytes: int
    content_hash: str
    rounding_rms: float
    rounding_max: float
    num_encoded: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The summary as plain values, for `--json`."""
        return {**asdict(self), "path": str(self.path)}


def cache_latents(
    images: Path, out: Path, config: Config, *, device: str = "auto", **settings: Any
) -> CacheSummary:
    """Encode an image folder into a latent cache in this process, or finish one that was begun.

    Args:
        images: folder with one subfolder per class, or an archive of one.
        out: the cache file.
        config: recipe: image size, channels, tokenizer, classes.
        device: where the tokenizer runs: auto, cpu, cuda or cuda:N.
        **settings: further fields of `CacheSettings`.

    Raises:
        UserError: as `run_cache`.
    """
    ranks = Ranks(0, 0, 1, pick_device(device))
    return run_cache(CacheSettings(Path(images), Path(out), **settings), config, ranks)


def run_cache(settings: CacheSettings, config: Config, ranks: Ranks) -> CacheSummary:
    """Make this rank's share of a latent cache.

    Ranks meet once, when the file has been created; none waits for another's work. So with several ranks the
    summary may tell of an unfinished cache: ask `summarize` again when all have ended.

    Raises:
        UserError: bad input (exit code 2, nothing written), too many bad images or a full disk (exit code 1;
            what was made stays).
    """
    plan, job = _plan(settings, config, ranks.device)
    if ranks.is_main:
        require_writable(settings.out.parent, 0, "the latent cache")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with CacheLock(settings.out) as lock:
        if ranks.is_main:
            lock.take()
            _prepare(plan, job, ranks.world_size)
            lock.share()
        ranks.barrier()
        if not ranks.is_main:
            lock.share()
        start = time.monotonic()
        num_encoded = _encode_share(plan, job, ranks)
    seconds = round(time.monotonic() - start, 3)
    return replace(summarize(settings.out), num_encoded=num_encoded, seconds=seconds)


def plan_cache(settings: CacheSettings, config: Config, device: str = "auto") -> CachePlan:
    """What `run_cache` would do, checked against the recipe, the disk and the cache that may be there; writes
    nothing.
    """
    return _plan(settings, config, pick_device(device))[0]


def _plan(settings: CacheSettings, config: Config, device: torch.device) -> tuple[CachePlan, Job]:
    """Check a job and open what it reads; writes nothing.

    Raises:
        UserError: a class count other than the recipe's, a cache of something else, a disk too small.
    """
    settings.check()
    job, tokenizer, precision = _open_job(settings, config, device)
    num_classes = len(job.class_names)
    if config.data.num_classes not in (0, num_classes):
        raise UserError(
            f"'{settings.images}' has {num_classes} classes, recipe '{config.name}' has "
            f"{config.data.num_classes}.",
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
    if settings.out.exists():
        there = CacheFile(settings.out)
        _refuse_other(settings.out, there.layout, layout)
        num_done = int((there.states == WRITTEN).sum())
    else:
        require_writable(settings.out.parent, total_bytes, "the latent cache")
    values = config.data.image_channels * config.data.image_size**2
    batch_size = settings.batch_size or max(1, min(MAX_BATCH, PIXEL_VALUES_PER_BATCH // values))
    return CachePlan(settings, layout, num_classes, batch_size, total_bytes, num_done), job


def _open_job(settings: CacheSettings, config: Config, device: torch.device) -> tuple[Job, str, str]:
    """What rows are made from, the tokenizer's identity, and the arithmetic it has encoded in."""
    flip = settings.flip == "encode"
    weights, scale = settings.tokenizer_weights, config.tokenizer.latent_scale
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
    codec = Codec(load_tokenizer(config, weights, device, PRECISIONS[precision]), scale)
    job = EncodeImages(source, codec, config.data.image_size, flip, device)
    return job, codec.tokenizer.identity, precision


def summarize(path: Path) -> CacheSummary:
    """What is in a cache now."""
    file = CacheFile(path)
    rounding = file.rounding()[file.states == WRITTEN]
    return CacheSummary(
        path=path,
        num_samples=len(rounding),
        num_bad=int((file.states == BAD).sum()),
        num_missing=len(file.states) - len(rounding) - int((file.states == BAD).sum()),
        num_classes=len(file.class_names),
        dtype=file.layout.dtype,
        bytes=file.layout.file_bytes(),
        content_hash=file.content_hash(),
        rounding_rms=float(np.sqrt(np.mean(np.square(rounding[:, 0])))) if len(rounding) else 0.0,
        rounding_max=float(rounding[:, 1].max(initial=0)),
    )


def bad_list_path(out: Path) -> Path:
    """Where the unusable images of a cache are listed."""
    return out.with_name(f"{out.name}.bad.jsonl")


def _prepare(plan: CachePlan, job: Job, num_shards: int) -> None:
    """Bring the cache file into being, unless it is there."""
    out = plan.settings.out
    bad_list_path(out).unlink(missing_ok=True)  # bad images are tried again
    if out.exists():
        log.info(f"continuing {out}: {plan.num_done} of {plan.layout.num_samples} images are done")
        return
    with _disk_errors(out):
        create_cache(
            out,
            plan.layout,
            [os.fsencode(name) for name in job.names],
            job.labels,
            [os.fsencode(name) for name in job.class_names],
            [printable(class_title(name)) for name in job.class_names],
            num_shards=min(num_shards, plan.layout.num_samples),
            shard_unit=plan.batch_size,
        )


def _encode_share(plan: CachePlan, job: Job, ranks: Ranks) -> int:
    """Make the missing rows that fall to this rank; the number of images made."""
    settings = plan.settings
    workers = settings.workers or os.cpu_count() or 1
    with LatentWriter(settings.out) as writer, _stop_on_sigterm():
        blocks = share_of_blocks(writer, plan.batch_size, ranks.rank, ranks.world_size)
        before = writer.states == WRITTEN
        todo = sum(int((~before[block.start : block.stop]).sum()) for block in blocks)
        label = "caching" if ranks.world_size == 1 else f"caching, rank 0 of {ranks.world_size}"
        bad = BadList(bad_list_path(settings.out), settings.max_bad)
        with progress(todo, label, enabled=ranks.is_main and todo > 0) as display, _disk_errors(settings.out):
            encode_blocks(job, blocks, writer, bad, display, workers)
        return int(((writer.states == WRITTEN) & ~before).sum())


def share_of_blocks(writer: LatentWriter, batch_size: int, rank: int, world_size: int) -> list[Block]:
    """The blocks with missing or bad rows that one rank makes.

    With one shard per rank, each rank makes those of its own file. On a resume with another number of ranks
    all that is left is divided evenly, and two ranks may write to one file: to rows of their own, so that
    neither needs a lock.
    """
    count = writer.layout.num_samples
    blocks = [Block(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    blocks = [block for block in blocks if (writer.states[block.start : block.stop] != WRITTEN).any()]
    shards = writer.file.shards
    if len(shards) == world_size:
        return [block for block in blocks if shards[rank].start <= block.start < shards[rank].stop]
    return blocks[len(blocks) * rank // world_size : len(blocks) * (rank + 1) // world_size]


def _refuse_other(path: Path, there: CacheLayout, wanted: CacheLayout) -> None:
    """Raise a UserError when the cache at `path` is one of something else than this job would make."""
    have, want = asdict(there), asdict(wanted)
    different = [name for name in have if have[name] != want[name]]
    if "source" in different or "num_samples" in different:
        raise UserError(
            f"'{path}' is a latent cache of other images: {there.num_samples} there, {wanted.num_samples} "
            "here.",
            "Choose another --out, or give the folder that it was made from, unchanged.",
        )
    if different:
        listed = ", ".join(f"{name} {have[name]} (asked for: {want[name]})" for name in different)
        raise UserError(
            f"'{path}' is a latent cache made in another way: {listed}.",
            "Choose another --out, or the settings it was made with.",
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn a failure of the disk into a UserError with exit code 1."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Writing '{path}' failed: {error.strerror or error}.",
            "Mend that (free some space, say); the same command goes on from what is stored.",
            exit_code=1,
        ) from error


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an orderly end that commits what was made, where nobody else handles it."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
