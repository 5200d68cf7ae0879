"""`xar cache-latents verify` and `info`: whether a cache is what it says, and what it says.

`inspect_cache` reads attributes and tables alone; `verify_cache` reads every byte.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xar_cli.cache.stage import summarize
from xar_cli.config import Config
from xar_cli.data.cache_file import MISSING, WRITTEN, CacheFile, hash_source
from xar_cli.data.latents import check_layout
from xar_cli.data.rows import RowReader
from xar_cli.errors import UserError
from xar_cli.logs import progress

ROWS_PER_READ = 256
SCALED_STD_RANGE = (0.5, 2.0)  # outside it, the latent scale does not bring latents to unit variance
SHOWN = 5  # examples of each fault


def inspect_cache(path: Path) -> dict[str, Any]:
    """What a cache says it is: layout, counts, size, where its rows lie; reads no moments.

    Raises:
        UserError: as `CacheFile`.
    """
    file = CacheFile(path)
    summary = summarize(path).as_dict()
    for key in ("num_encoded", "seconds"):
        del summary[key]
    files = [{"file": shard.path.name, "rows": shard.stop - shard.start} for shard in file.shards]
    return {
        **summary,
        **asdict(file.layout),
        "num_samples": summary["num_samples"],
        "rows": file.layout.num_samples,
        "complete": file.is_complete,
        "storage": "contiguous" if files else "chunked or compressed (read through HDF5)",
        "files": files,
        "classes": [
            {"label": label, "name": name, "title": title}
            for label, (name, title) in enumerate(zip(file.class_names, file.class_titles, strict=True))
        ],
    }


@dataclass
class Verdict:
    """What `verify_cache` found.

    Attributes:
        path: the cache file.
        tokenizer: identity of the tokenizer that the cache names.
        num_samples, num_bad, num_missing, num_classes: counts.
        checksum_errors: rows whose bytes are not those that were written.
        not_finite: rows with NaN or Inf.
        dead: rows whose mean is the same everywhere: a blank image, or no image at all.
        duplicates: rows with the same bytes as an earlier one.
        channel_mean, channel_std: of the raw latents, per channel, sampling noise included.
        scaled_std: standard deviation over all channels times the latent scale; about 1 in a good recipe.
        faults: what is wrong, one sentence each; none in a sound cache.
        warnings: what may be wrong.
    """

    path: Path
    tokenizer: str
    num_samples: int
    num_bad: int
    num_missing: int
    num_classes: int
    checksum_errors: int = 0
    not_finite: int = 0
    dead: int = 0
    duplicates: int = 0
    channel_mean: list[float] = field(default_factory=list)
    channel_std: list[float] = field(default_factory=list)
    scaled_std: float = 0.0
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the cache is sound."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {"ok": self.ok, **asdict(self), "path": str(self.path)}


def verify_cache(path: Path, config: Config | None = None, tokenizer: str | None = None) -> Verdict:
    """Read a whole cache and check it.

    Args:
        path: the cache file.
        config: a recipe that it should fit, if any.
        tokenizer: identity of the tokenizer that it should have been made with, if known.

    Raises:
        UserError: the file cannot be read at all, or does not fit the recipe.
    """
    file = CacheFile(path)
    if config is not None:
        check_layout(path, file.layout, len(file.class_names), config)
    if tokenizer is not None and tokenizer != file.layout.tokenizer:
        raise UserError(
            f"'{path}' was made with the tokenizer {file.layout.tokenizer}, not {tokenizer}.",
            "Give the weights that it was made with, or make a cache with these.",
        )
    written = np.flatnonzero(file.states == WRITTEN)
    verdict = Verdict(
        path=path,
        tokenizer=file.layout.tokenizer,
        num_samples=len(written),
        num_bad=int((file.states > WRITTEN).sum()),
        num_missing=int((file.states == MISSING).sum()),
        num_classes=len(file.class_names),
    )
    if verdict.num_missing:
        verdict.faults.append(f"{verdict.num_missing} of {len(file.states)} images are not done")
    elif not len(written):
        verdict.faults.append("it holds no sample: all images are bad")
    _check_classes(file, written, verdict)
    _check_rows(file, written, verdict)
    return verdict


def _check_classes(file: CacheFile, written: np.ndarray, verdict: Verdict) -> None:
    labels, count = file.labels[written], len(file.class_names)
    names = file.names()
    if names is None:
        verdict.warnings.append("the file has no names: whether its labels are those of its images is not known")
    elif hash_source(names, file.labels) != file.layout.source:
        verdict.faults.append("names or labels are not those of the images that it was made from")
    if len(set(file.class_names)) != count:
        verdict.faults.append("two classes have the same name")
    highest = max(count, 1)  # without classes all labels are 0
    outside = int(((labels < 0) | (labels >= highest)).sum())
    if outside:
        verdict.faults.append(f"{outside} labels lie outside 0 to {highest - 1}")
    empty = sorted(set(range(count)) - set(labels.tolist()))
    if empty:
        verdict.warnings.append(f"{len(empty)} classes have no image: {_some(empty)}")


def _check_rows(file: CacheFile, written: np.ndarray, verdict: Verdict) -> None:
    """Every row: its checksum, its numbers, and what they add to the statistics."""
    channels, sets = file.layout.latent_channels, len(file.layout.moments_names)
    reader = RowReader(file)
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    wrong: list[int] = []
    strange: list[int] = []
    dead: list[int] = []
    with progress(len(written), "verifying") as display:
        for start in range(0, len(written), ROWS_PER_READ):
            rows = written[start : start + ROWS_PER_READ]
            stored = [reader.read(rows, np.full(len(rows), which)) for which in range(sets)]
            for i, row in enumerate(rows.tolist()):
                checksum = 0
                for moments in stored:
                    checksum = zlib.crc32(moments[i], checksum)
                if file.checksums is not None and checksum != file.checksums[row]:
                    wrong.append(row)
            for moments in stored:
                finite = np.isfinite(moments).all(axis=(1, 2, 3))
                strange += rows[~finite].tolist()
                mean = moments[:, :channels].astype(np.float64)
                flat = np.ptp(mean.reshape(len(rows), channels, -1), axis=-1).max(axis=-1) == 0
                dead += rows[finite & flat].tolist()
                variance = np.exp(np.minimum(moments[finite, channels:].astype(np.float64), 30))
                count += int(finite.sum()) * mean[0, 0].size
                total += mean[finite].sum(axis=(0, 2, 3))
                squares += (np.square(mean[finite]) + variance).sum(axis=(0, 2, 3))
            display.update(len(rows), faults=len(wrong) + len(strange))
    strange, dead = sorted(set(strange)), sorted(set(dead))
    verdict.checksum_errors, verdict.not_finite, verdict.dead = len(wrong), len(strange), len(dead)
    if file.checksums is not None:
        verdict.duplicates = _count_duplicates(reader, written, file.checksums[written], sets)
    else:
        verdict.warnings.append("the file has no checksums: whether its bytes are as written is not known")
    if wrong:
        verdict.faults.append(f"{len(wrong)} rows have other bytes than were written: {_some(wrong)}")
    if strange:
        verdict.faults.append(f"{len(strange)} rows hold NaN or Inf: {_some(strange)}")
    if dead:
        verdict.warnings.append(f"{len(dead)} rows are the same everywhere (blank images): {_some(dead)}")
    if count:
        _add_statistics(file, verdict, total / count, squares / count)


def _count_duplicates(reader: RowReader, rows: np.ndarray, checksums: np.ndarray, sets: int) -> int:
    """Rows with the bytes of an earlier one: those of equal checksum are compared, since among a million rows some
    hundred have that of another by chance.
    """
    order = np.argsort(checksums, kind="stable")
    _, starts, counts = np.unique(checksums[order], return_index=True, return_counts=True)
    duplicates = 0
    for start, count in zip(starts[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        alike = rows[order[start : start + count]]
        distinct = {reader.read(np.repeat(row, sets), np.arange(sets)).tobytes() for row in alike}
        duplicates += count - len(distinct)
    return duplicates


def _add_statistics(file: CacheFile, verdict: Verdict, mean: np.ndarray, square: np.ndarray) -> None:
    """Statistics of samples mean + exp(logvar / 2) eps: E x^2 = mean^2 + variance of the posterior."""
    verdict.channel_mean = np.round(mean, 6).tolist()
    verdict.channel_std = np.round(np.sqrt(np.maximum(square - mean**2, 0)), 6).tolist()
    overall = float(np.sqrt(np.maximum(square.mean() - mean.mean() ** 2, 0)))
    verdict.scaled_std = round(overall * file.layout.latent_scale, 6)
    low, high = SCALED_STD_RANGE
    if not low <= verdict.scaled_std <= high:
        verdict.warnings.append(
            f"latents times the scale {file.layout.latent_scale} have a standard deviation of "
            f"{verdict.scaled_std:.3g}, not about 1: set tokenizer.latent_scale to "
            f"{1 / max(overall, 1e-12):.4g}"
        )


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")
