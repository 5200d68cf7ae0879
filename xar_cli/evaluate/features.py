"""From images to tables of features: reading, batching, ranks, and the cache by content hash.

A table lies on disk and is memory-mapped, so memory stays flat however many images there are; with several ranks,
each writes its own rows of the same files. Legend: N images.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xar_cli.config.schema import pixels_text, sides_text
from xar_cli.data.images import BadImageError
from xar_cli.device_memory import memory_for
from xar_cli.distributed import Ranks, Value
from xar_cli.errors import UserError
from xar_cli.evaluate.frechet import Gaussian
from xar_cli.evaluate.images import FolderImages, ImageSet
from xar_cli.evaluate.metrics import moments
from xar_cli.evaluate.networks import FeatureNetwork
from xar_cli.hub import is_sha256
from xar_cli.logs import log, progress
from xar_cli.run_dir import flush, require_writable, write_at, write_atomic, write_json
from xar_cli.stopping import stop_between_pieces

TABLE_VERSION = 1
DONE = "table.json"
MIXED_SIZES_STEP = "Give images of one size, or --image-size SIDE (or HEIGHTxWIDTH) for ADM's centre crop."
HALF_MADE = re.compile(r"\.([0-9a-f]{16}\.|features-)[a-z0-9_]{8}")  # names of the folders of `_make_folder`
LEFTOVER_SECONDS = 24 * 3600.0  # for which nobody has written into one whose process is gone
BATCHES_AHEAD = 2  # batches that threads decode while the network works


@dataclass
class FeatureTable:
    """The features of some images.

    Attributes:
        layers: name to (N, width) float32, memory-mapped.
        rows: (N,) index of each row's image in its set: images that could not be read are left out.
        skipped: names of those.
        image_size: (H, W) of the first image.
        images_per_second: how fast they were computed, over all ranks; None when they came from the cache.
    """

    layers: Mapping[str, np.ndarray]
    rows: np.ndarray
    skipped: list[str]
    image_size: tuple[int, int]
    images_per_second: float | None

    def __post_init__(self) -> None:
        self._gaussians: dict[str, Gaussian] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def gaussian(self, layer: str) -> Gaussian:
        """Mean and covariance of a layer, computed once."""
        if layer not in self._gaussians:
            self._gaussians[layer] = moments(self.layers[layer]).gaussian()
        return self._gaussians[layer]


def extract(
    images: ImageSet,
    network: FeatureNetwork,
    ranks: Ranks,
    *,
    indices: np.ndarray,
    content_hash: str,
    batch_size: int = 64,
    workers: int = 4,
    skip_bad: bool = False,
    cache: Path | None = None,
) -> FeatureTable:
    """Features of some images of a set, from the cache where they are there already.

    Every rank calls this; all of them get the whole table.

    Args:
        indices: which images, ascending.
        content_hash: of the whole set.
        skip_bad: leave out images that cannot be read, instead of refusing them.
        cache: folder of tables by content hash; None computes into a temporary folder. With several machines it
            must be on a disk that all of them see.

    Raises:
        UserError: an image cannot be read, sizes differ where the network needs one size, or the disk failed.
    """
    selection = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
    key = hashlib.sha256(
        f"{TABLE_VERSION}/{content_hash}/{selection}/{network.identity}/{skip_bad}".encode()
    ).hexdigest()
    final = cache / key if cache is not None and images.keep_features else None
    if final is not None and ranks.on_main(lambda: _is_stored(final, network)):
        log.info(f"features of {images.name} ({network.name}) are in the cache")
        return _seen_by_all(ranks, final, lambda: _open_table(final, network))
    partial = ranks.on_main(lambda: _make_folder(cache, final, network, len(indices)))
    start = time.monotonic()
    try:
        _seen_by_all(ranks, partial, lambda: os.listdir(partial))
        outcome = _extract_rows(images, network, ranks, partial, indices, batch_size, workers, skip_bad)
        outcomes = _exchange(outcome, network, ranks)
        seconds = time.monotonic() - start
        ranks.on_main(lambda: _finish(partial, final, network, indices, outcomes, images))
        table = _seen_by_all(ranks, final or partial, lambda: _open_table(final or partial, network))
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if ranks.is_main and final is None:
        weakref.finalize(table, shutil.rmtree, partial, ignore_errors=True)
    table.images_per_second = len(indices) / max(seconds, 1e-9)
    return table


def spread_rows(available: int, count: int | None) -> np.ndarray:
    """Indices of `count` images, spread evenly, so that a set sorted by class keeps all classes."""
    if count is None or count == available:
        return np.arange(available)
    if count > available:
        raise UserError(f"{count} images are asked for and {available} are there.", "Lower --count or sample more.")
    return np.arange(count) * available // count


def content_hash_of(images: ImageSet, cache: Path | None) -> str:
    """The content hash of a set; for a folder it is remembered while names, sizes and times of its files stay."""
    if cache is None or not isinstance(images, FolderImages):
        return images.content_hash()
    note = cache / "hashes" / images.fingerprint()
    with contextlib.suppress(OSError):
        known = note.read_bytes().decode(errors="replace")
        if is_sha256(known):  # else damaged
            return known
    found = images.content_hash()
    try:
        write_atomic(note, found)
    except OSError as error:  # a full disk, or a cache that another person filled
        log.warning(f"the content hash of {images.name} is not kept: {error.strerror}")
    return found


@dataclass
class _Outcome:
    """What one rank has to say after its rows."""

    bad_rows: list[int]
    image_size: tuple[int, int] | None
    error: UserError | None = None


def _extract_rows(
    images: ImageSet,
    network: FeatureNetwork,
    ranks: Ranks,
    folder: Path,
    indices: np.ndarray,
    batch_size: int,
    workers: int,
    skip_bad: bool,
) -> _Outcome:
    first = ranks.rank * len(indices) // ranks.world_size
    last = (ranks.rank + 1) * len(indices) // ranks.world_size
    outcome = _Outcome([], None)
    check = _SizeCheck(network, images)
    try:
        with (
            closing(_RowWriter(folder, network)) as tables,
            stop_between_pieces(signal.SIGINT, signal.SIGTERM) as stop,
            progress(last - first, f"features ({network.name})", enabled=ranks.is_main) as display,
        ):
            for rows, loaded in _batches(images, network, indices, first, last, batch_size, workers):
                stop()
                good: list[tuple[int, np.ndarray]] = []
                for row, item in zip(rows, loaded, strict=True):
                    if isinstance(item, BadImageError):
                        if not skip_bad:
                            raise UserError(item.message, "Mend or remove it, or leave it out with --skip-bad.")
                        outcome.bad_rows.append(row)
                        log.warning(f"left out: {item.message}")
                    else:
                        check(item.size, int(indices[row]))
                        good.append((row, item.pixels))
                if good:
                    _write_rows(tables, network, good, min(batch_size, last - first))
                display.update(len(rows), skipped=len(outcome.bad_rows))
    except UserError as error:
        outcome.error = error
    outcome.image_size = check.size
    return outcome


class _RowWriter:
    """Writes rows of the tables in a folder, and no byte beside them: the next rows may be another rank's, on another
    machine, and a memory map would write whole pages back. A full disk is an error here, where there it is a signal.
    """

    def __init__(self, folder: Path, network: FeatureNetwork) -> None:
        paths = {layer: folder / f"{layer}.npy" for layer in network.layers}
        with _storing():
            self.starts = {layer: np.load(path, mmap_mode="r").offset for layer, path in paths.items()}
            self.files = {layer: path.open("r+b", buffering=0) for layer, path in paths.items()}

    def write(self, layer: str, rows: Sequence[int], values: np.ndarray) -> None:
        """Put (B, width) float32 values into these rows of a table."""
        with _storing():
            for row, value in zip(rows, np.ascontiguousarray(values, "<f4"), strict=True):
                write_at(self.files[layer].fileno(), value.tobytes(), self.starts[layer] + row * value.nbytes)

    def close(self) -> None:
        """Put all on the disk and close the files; a network drive may tell only now that it is full."""
        with _storing():
            for file in self.files.values():
                os.fsync(file.fileno())
                file.close()


@contextmanager
def _storing() -> Iterator[None]:
    """Have a disk that is full, or fails, be a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The features cannot be stored: {error.strerror or error}.",
            "Make room, or choose another --feature-cache.",
            exit_code=1,
        ) from None


def _write_rows(
    tables: _RowWriter, network: FeatureNetwork, good: list[tuple[int, np.ndarray]], batch_size: int
) -> None:
    rows = [row for row, _ in good]
    work = f"The network '{network.name}' on {batch_size} images at a time"
    next_step = "Lower --batch-size, or sample.batch_size where it is training that evaluates."
    try:
        pixels = np.stack([image for _, image in good])
        short = batch_size - len(pixels)
        if short > 0 and network.compiled is not None:  # one batch shape: repeat the last image and drop its features
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], short, axis=0)])
        with memory_for(work, next_step):
            features = network.features(pixels)
    except MemoryError:
        raise UserError(f"{work} does not fit into the memory.", next_step, exit_code=1) from None
    for layer, values in features.items():
        if not np.isfinite(values[: len(rows)]).all():
            raise UserError(
                f"The network '{network.name}' gave features that are not finite.", "Check its weights.", exit_code=1
            )
        tables.write(layer, rows, values[: len(rows)])


@dataclass
class _Loaded:
    pixels: np.ndarray  # as the network wants them
    size: tuple[int, int]  # of the image itself


def _batches(
    images: ImageSet, network: FeatureNetwork, indices: np.ndarray, first: int, last: int, batch_size: int, workers: int
) -> Iterator[tuple[range, list[_Loaded | BadImageError]]]:
    """Batches of rows with their images; threads decode some batches ahead (Pillow frees the interpreter lock)."""

    def prepare(image: np.ndarray) -> _Loaded:
        return _Loaded(network.prepare(image), (image.shape[0], image.shape[1]))

    def load(row: int) -> _Loaded | BadImageError:
        try:
            return prepare(images.load(int(indices[row])))
        except BadImageError as error:
            return error

    spans = [range(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
    if images.generated:
        for span in spans:
            yield span, [prepare(image) for image in images.load_many(indices[span.start : span.stop].tolist())]
        return
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        remaining = iter(spans)
        waiting = [
            (span, [pool.submit(load, row) for row in span]) for span in itertools.islice(remaining, BATCHES_AHEAD)
        ]
        while waiting:
            span, futures = waiting.pop(0)
            loaded = [future.result() for future in futures]
            waiting += [(extra, [pool.submit(load, row) for row in extra]) for extra in itertools.islice(remaining, 1)]
            yield span, loaded


class _SizeCheck:
    """All images of a set have one size, unless the network resizes each alone."""

    def __init__(self, network: FeatureNetwork, images: ImageSet) -> None:
        self.network, self.images = network, images
        self.size: tuple[int, int] | None = None

    def __call__(self, size: tuple[int, int], index: int) -> None:
        wanted = self.network.input_size or (self.size if not self.network.mixes_sizes else None)
        if wanted is not None and size != wanted:
            raise UserError(
                f"{self.images.item_name(index)} has {pixels_text(size)} where {sides_text(wanted)} are expected.",
                "The digits protocol takes 8 x 8 images as they are: choose another --protocol."
                if self.network.input_size
                else MIXED_SIZES_STEP,
            )
        self.size = self.size or size


def _make_folder(cache: Path | None, final: Path | None, network: FeatureNetwork, count: int) -> Path:
    """A folder with empty tables; those that have no place in the cache lie there, or in the system's temporary folder,
    while they are used.
    """
    place = cache or Path(tempfile.gettempdir())
    row_bytes = 4 * sum(network.layers.values())
    require_writable(place, count * row_bytes + (1 << 20), "the features")
    path = place / f".{final.name[:16] + '.' if final else 'features-'}{secrets.token_hex(4)}"
    with _storing():
        place.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place)
        path.mkdir(0o777 if final else 0o700)  # a cache may be shared, as the umask has it
        try:
            for layer, width in network.layers.items():
                np.lib.format.open_memmap(path / f"{layer}.npy", "w+", np.float32, (count, width)).flush()
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
    return path


def _seen_by_all(ranks: Ranks, folder: Path, look: Callable[[], Value]) -> Value:
    """What `look` finds in a folder, on every rank; a UserError on all where one does not see it.

    No rank goes on before all have looked: what is there may be removed then.
    """

    def seen() -> Value:
        try:
            return look()
        except OSError as error:
            raise UserError(
                f"Rank {ranks.rank} does not see the features in '{folder}': {error.strerror}.",
                "Give --feature-cache on a disk shared by all machines.",
            ) from None

    return ranks.on_all(seen)


def _remove_leftovers(place: Path) -> None:
    """Remove the tables that one's own processes left half made, or for a time, when they were killed."""
    for folder in place.iterdir():
        if not HALF_MADE.fullmatch(folder.name):
            continue
        try:
            is_ours = folder.stat().st_uid == os.getuid()
            touched = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:  # its process is finishing it just now, or it is private
            continue
        if is_ours and time.time() - touched > LEFTOVER_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _exchange(outcome: _Outcome, network: FeatureNetwork, ranks: Ranks) -> list[_Outcome]:
    """Every rank's outcome, on every rank; an error of one is raised on all."""
    outcomes: Sequence[Any] = ranks.gather(outcome)
    for found in outcomes:
        if found.error is not None:
            raise found.error
    sizes = {found.image_size for found in outcomes if found.image_size is not None}
    if not sizes:
        raise UserError("None of the images could be read.", "See the names above.")
    if len(sizes) > 1 and not network.mixes_sizes:
        raise UserError(f"Images of several sizes are mixed: {sorted(sizes)}.", MIXED_SIZES_STEP)
    return list(outcomes)


def _finish(
    partial: Path,
    final: Path | None,
    network: FeatureNetwork,
    indices: np.ndarray,
    outcomes: Sequence[_Outcome],
    images: ImageSet,
) -> None:
    """Complete the tables, and put them into their place in the cache."""
    with _storing():
        _complete(partial, network, indices, outcomes, images)
        if final is None:
            return
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():
                raise
            shutil.rmtree(partial)  # another process was faster


def _complete(
    folder: Path, network: FeatureNetwork, indices: np.ndarray, outcomes: Sequence[_Outcome], images: ImageSet
) -> None:
    """Cut out rows of images that were left out, and say what the table holds."""
    bad = sorted(row for outcome in outcomes for row in outcome.bad_rows)
    kept = np.setdiff1d(np.arange(len(indices)), bad)
    if bad:
        for layer in network.layers:
            full = np.load(folder / f"{layer}.npy", mmap_mode="r")
            form = {"descr": "<f4", "fortran_order": False, "shape": (len(kept), full.shape[1])}
            with (folder / f"{layer}.dense.npy").open("wb") as dense:
                np.lib.format.write_array_header_1_0(dense, form)
                for row in kept:
                    dense.write(full[row].tobytes())
            flush(folder / f"{layer}.dense.npy")
            (folder / f"{layer}.dense.npy").replace(folder / f"{layer}.npy")
    np.save(folder / "rows.npy", indices[kept])
    flush(folder / "rows.npy")
    size = next(outcome.image_size for outcome in outcomes if outcome.image_size is not None)
    skipped = [images.item_name(int(indices[row])) for row in bad]
    write_json(folder / DONE, {"network": network.identity, "image_size": size, "skipped": skipped})


def _is_stored(folder: Path, network: FeatureNetwork) -> bool:
    """Whether a table is in the cache; a damaged one is removed, to be made again."""
    try:
        if not folder.exists():
            return False
        table = _open_table(folder, network)
        for layer, values in table.layers.items():
            if values.shape != (len(table), network.layers[layer]):
                raise ValueError(f"{layer} is {values.shape}")
    except (FileNotFoundError, EOFError, KeyError, TypeError, ValueError) as error:
        log.warning(f"the features in '{folder}' are damaged and are made again ({error})")
        with _storing():
            shutil.rmtree(folder)
        return False
    except OSError as error:  # they may be whole
        raise UserError(
            f"The features in '{folder}' cannot be read: {error.strerror}.",
            "Mend their permissions or disk, or choose another --feature-cache.",
        ) from None
    return True


def _open_table(folder: Path, network: FeatureNetwork) -> FeatureTable:
    about = json.loads((folder / DONE).read_text(encoding="utf-8"))
    layers = {layer: np.load(folder / f"{layer}.npy", mmap_mode="r") for layer in network.layers}
    height, width = about["image_size"]
    return FeatureTable(layers, np.load(folder / "rows.npy"), about["skipped"], (height, width), None)
