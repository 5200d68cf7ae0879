"""`xar cache-latents`: images to a latent cache, from the plan to the summary.

The stage can be run again at any time: what is stored stays, what is missing is made. The plan: plan.py; the
flow of work: pipeline.py; the file: data/cache_file.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xar_cli.cache.jobs import Job
from xar_cli.cache.pipeline import BadList, Block, encode_blocks, too_many_bad
from xar_cli.cache.plan import CachePlan, CacheSettings, make_plan, require_room
from xar_cli.config import Config
from xar_cli.data.cache_file import BAD, MISSING, WRITTEN, CacheFile, create_cache, leftovers
from xar_cli.data.imagenet import class_title
from xar_cli.data.images import printable
from xar_cli.data.latents import LatentWriter
from xar_cli.distributed import Ranks, cores_of_rank, pick_device, process_group
from xar_cli.errors import UserError
from xar_cli.lock import JobLock
from xar_cli.logs import log, progress
from xar_cli.stopping import stop_between_pieces


@dataclass(frozen=True)
class CacheSummary:
    """What is in a cache.

    Attributes:
        path: the cache file.
        num_samples: usable samples in it.
        num_bad: images that were left out.
        num_missing: images not done yet; 0 for a finished cache.
        num_classes: classes.
        dtype: of the stored moments.
        bytes: size of the rows on disk.
        content_hash: identity of the data.
        rounding_rms, rounding_max: what storing in `dtype` changed, root mean square and at most, in units of
            the moments.
        num_encoded: images that this process made in this run.
        seconds: how long that took.
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


def cache_latents(images: Path, out: Path, config: Config, *, device: str = "auto", **settings: Any) -> CacheSummary:
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
    return run_cache(CacheSettings(images=images, out=out, config=config, device=device, **settings), ranks)


def run_stage(settings: CacheSettings) -> dict[str, Any]:
    """The stage as a process of a job, alone or one of many.

    Returns:
        What `--json` prints: the summary of what all ranks have made. Only rank 0 has something to say.
    """
    with process_group(settings.device) as ranks:
        began = time.monotonic()
        summary = run_cache(settings, ranks)
    if not ranks.is_main:
        return {}
    if ranks.world_size == 1:
        return summary.as_dict()
    finished = replace(summarize(settings.out), seconds=time.monotonic() - began)  # the ranks have left together
    return {**finished.as_dict(), "num_encoded": None}


def plan_cache(settings: CacheSettings) -> CachePlan:
    """What the stage would do, with all checks made; writes nothing."""
    plan, _ = make_plan(settings, pick_device(settings.device))
    require_room(settings.out, plan)
    return plan


def run_cache(settings: CacheSettings, ranks: Ranks) -> CacheSummary:
    """Make this rank's share of a latent cache.

    Ranks meet before the work, to create the file and to divide what is to do, and not again in here; what rank 0 is
    refused there is refused to all. So with several ranks the summary may tell of an unfinished cache: ask `summarize`
    again when all have ended.

    Raises:
        UserError: bad input (exit code 2, nothing written), too many bad images or a full disk (exit code 1;
            what was made stays).
    """
    plan, job = make_plan(settings, ranks.device)
    ranks.on_main(lambda: require_room(settings.out, plan))
    with _disk_errors(settings.out):
        settings.out.parent.mkdir(parents=True, exist_ok=True)
    with cache_lock(settings.out) as lock:
        ranks.on_main(lambda: _take_and_prepare(lock, settings.out, plan, job, ranks.world_size))
        lock.share()
        with _disk_errors(settings.out), LatentWriter(settings.out) as writer:
            blocks = share_of_blocks(writer, plan.batch_size, ranks.rank, ranks.world_size)
            ranks.barrier()  # nobody writes before all have divided the same work
            start = time.monotonic()
            num_encoded = _encode_share(settings, job, writer, blocks, ranks)
    seconds = round(time.monotonic() - start, 3)
    return replace(summarize(settings.out), num_encoded=num_encoded, seconds=seconds)


def cache_lock(path: Path) -> JobLock:
    """The right to write a cache: `.<name>.lock` beside it, the same by whatever link it is named; its folder must be
    there.
    """
    path = path.resolve() if path.exists() else path
    return JobLock(path.with_name(f".{path.name}.lock"), f"The latent cache '{path}' is being written")


def summarize(path: Path) -> CacheSummary:
    """What is in a cache now."""
    file = CacheFile(path)
    rounding = file.rounding()[file.states == WRITTEN].astype(np.float64)
    return CacheSummary(
        path=path,
        num_samples=len(rounding),
        num_bad=int(np.count_nonzero(file.states == BAD)),
        num_missing=int(np.count_nonzero(file.states == MISSING)),
        num_classes=len(file.class_names),
        dtype=file.layout.dtype,
        bytes=file.layout.file_bytes(),
        content_hash=file.content_hash(),
        rounding_rms=float(np.sqrt(np.mean(np.square(rounding[:, 0])))) if len(rounding) else 0.0,
        rounding_max=float(rounding[:, 1].max(initial=0)),
    )


def require_few_bad(settings: CacheSettings, num_bad: int) -> None:
    """Raise the UserError of too many bad images for those of all ranks, of which each has counted its own."""
    if settings.max_bad is not None and num_bad > settings.max_bad:
        raise too_many_bad(bad_list_path(settings.out), num_bad, settings.max_bad)


def bad_list_path(out: Path) -> Path:
    """Where the unusable images of a cache are listed."""
    return out.with_name(f"{out.name}.bad.jsonl")


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
    if len(shards) == world_size and all(shard.start % batch_size == 0 for shard in shards):
        return [block for block in blocks if shards[rank].start <= block.start < shards[rank].stop]
    return blocks[len(blocks) * rank // world_size : len(blocks) * (rank + 1) // world_size]


def _take_and_prepare(lock: JobLock, out: Path, plan: CachePlan, job: Job, num_shards: int) -> None:
    """Rank 0's part before the work: the lock, to be shared with the other ranks, and the cache file."""
    lock.take()
    _prepare(out, plan, job, num_shards)
    lock.share()


def _prepare(out: Path, plan: CachePlan, job: Job, num_shards: int) -> None:
    """Bring the cache file into being, unless it is there; without what a killed process left of another try."""
    bad_list_path(out).unlink(missing_ok=True)  # bad images are tried again
    if out.exists():
        log.info(f"continuing {out}: {plan.num_done} of {plan.layout.num_samples} images are done")
        return
    for file in leftovers(out):
        file.unlink(missing_ok=True)
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


def _encode_share(settings: CacheSettings, job: Job, writer: LatentWriter, blocks: list[Block], ranks: Ranks) -> int:
    """Make the missing rows of some blocks; the number of images made."""
    before = writer.states == WRITTEN
    todo = sum(int(np.count_nonzero(~before[block.start : block.stop])) for block in blocks)
    label = "caching" if ranks.world_size == 1 else f"caching, rank 0 of {ranks.world_size}"
    bad = BadList(bad_list_path(settings.out), settings.max_bad)
    with (
        stop_between_pieces(signal.SIGINT, signal.SIGTERM) as stop,
        progress(todo, label, enabled=ranks.is_main and todo > 0) as display,
    ):
        encode_blocks(job, blocks, writer, bad, display, settings.workers or cores_of_rank(ranks.world_size), stop)
    return int(np.count_nonzero((writer.states == WRITTEN) & ~before))


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
