"""Reading latents: this project's cache against MAR's layout, one `.npz` file per image.

    python benchmarks/latents.py                 # 20,000 samples, about 2 GB of temporary disk
    python benchmarks/latents.py --samples 2000  # a quick look

Both hold the same random moments of ImageNet's shape, float32 there and float16 here (the defaults of each).
Every comparison is made in one process, in turns A B B A, after a warm-up that brings both into the page
cache; the figure is the median ratio of the pairs, with the smallest and largest beside it, and A against A
as the noise floor. What the two read is compared first: no speed is printed for different data.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks import timing
from xar_cli.data.cache_file import CacheLayout, create_cache
from xar_cli.data.latents import LatentReader, LatentWriter
from xar_cli.data.loader import LatentLoader
from xar_cli.data.sharding import SampleStream
from xar_cli.errors import UserError

NUM_CLASSES = 1000
ROW = (32, 16, 16)  # 2C, H, W of a 256 x 256 image in KL-16
BATCH = 256
WORKERS = 2
PAIRS = 6
CHUNK = 2000  # samples of one turn, sample by sample


def moments_of(rng: np.random.Generator, count: int) -> np.ndarray:
    """Moments in the range of KL-16's: means of a standard deviation of 4, log-variances about -8."""
    values = rng.standard_normal((count, *ROW), dtype=np.float32)
    values[:, :16] *= 4
    values[:, 16:] -= 8
    return values


def write_both(folder: Path, count: int) -> tuple[Path, Path]:
    """The same samples in both layouts; the paths of the cache and of MAR's folder."""
    layout = CacheLayout(
        num_samples=count, latent_channels=16, grid=(16, 16), dtype="float16", flip=True, tokenizer="kl16:benchmark",
        precision="fp32", latent_scale=0.2325, image_size=256, image_channels=3, crop="adm-centre", source="",
    )  # fmt: skip
    cache, mar = folder / "latents.h5", folder / "mar"
    num_classes = min(NUM_CLASSES, count)
    labels = np.arange(count) * num_classes // count
    names = [f"class-{label:04d}/{i:08d}.npz" for i, label in enumerate(labels.tolist())]
    classes = [f"class-{label:04d}".encode() for label in range(num_classes)]
    create_cache(cache, layout, [name.encode() for name in names], labels, classes)
    rng = np.random.default_rng(0)
    with LatentWriter(cache) as writer:
        for start in range(0, count, 500):
            stop = min(start + 500, count)
            image, mirror = moments_of(rng, stop - start), moments_of(rng, stop - start)
            writer.write(np.arange(start, stop), image, mirror)
            for i in range(start, stop):
                path = mar / names[i]
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez(path, moments=image[i - start], moments_flip=mirror[i - start])
        writer.commit()
    return cache, mar


class MarFolder(Dataset):
    """MAR's layout as its training reads it: open one file, take one of its two arrays."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted(str(path) for path in root.rglob("*.npz"))
        classes = {name: label for label, name in enumerate(sorted(path.name for path in root.iterdir()))}
        self.labels = [classes[os.path.basename(os.path.dirname(path))] for path in self.paths]
        self.flips = np.zeros(len(self.paths), np.bool_)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with np.load(self.paths[index]) as arrays:
            moments = arrays["moments_flip" if self.flips[index] else "moments"]
        return torch.from_numpy(moments), self.labels[index]


def resident_bytes() -> int:
    """Memory of this process that is its own (mapped and shared pages left out)."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def disk_bytes(path: Path) -> int:
    """Bytes on disk of a file or of all files below a folder, and the folders themselves."""
    every = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(entry.stat().st_blocks * 512 for entry in every)


def measure(folder: Path, count: int) -> dict[str, object]:
    """All figures."""
    cache, mar_root = write_both(folder, count)
    reader, mar = LatentReader(cache), MarFolder(mar_root)
    rng = np.random.default_rng(1)
    mar.flips = flips = rng.random(count) < 0.5
    for i in rng.integers(0, count, 200):
        theirs, label = mar[int(i)]
        ours, labels = reader.read(np.array([i]), flips[[i]])
        if labels[0] != label or not np.array_equal(ours[0], theirs.numpy().astype(np.float16)):
            raise SystemExit(f"Sample {i} is not the same in both: no speed is printed.")

    chunk = min(CHUNK, count)

    def timed(work: Callable[[np.ndarray], None]) -> float:
        order = rng.permutation(count)[:chunk]
        start = time.perf_counter()
        work(order)
        return chunk / (time.perf_counter() - start)

    def ours_one(order: np.ndarray) -> None:
        for i in range(len(order)):
            reader.read(order[i : i + 1], flips[order[i : i + 1]])

    def ours_batch(order: np.ndarray) -> None:
        for i in range(0, len(order), BATCH):
            reader.read(order[i : i + BATCH], flips[order[i : i + BATCH]])

    def theirs_one(order: np.ndarray) -> None:
        for i in order.tolist():
            mar[i]

    stream = SampleStream(count, BATCH, seed=0)
    batches = max(4, min(40, count // BATCH))

    def consume(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Every value is touched, as a training step would."""
        batch[0].float().sum()

    def ours_loader() -> float:
        loader = iter(LatentLoader(reader, stream, mirrored=lambda step: flips[stream.indices(step)], threads=WORKERS))
        consume(next(loader))
        start = time.perf_counter()
        for batch in islice(loader, batches):
            consume(batch)
        return batches * BATCH / (time.perf_counter() - start)

    def theirs_loader() -> float:
        order = [stream.indices(step).tolist() for step in range(batches + 1)]
        loader = iter(DataLoader(mar, batch_sampler=order, num_workers=WORKERS, prefetch_factor=2))
        consume(next(loader))
        start = time.perf_counter()
        for batch in loader:
            consume(batch)
        return batches * BATCH / (time.perf_counter() - start)

    for path in mar.paths:  # warm: both in the page cache
        Path(path).read_bytes()
    ours_batch(np.arange(count))

    def in_turns(first: Callable[[], float], second: Callable[[], float]) -> dict[str, float]:
        first(), second()
        return timing.in_turns(first, second, PAIRS)

    results: dict[str, object] = {
        "noise floor: npz against npz": in_turns(lambda: timed(theirs_one), lambda: timed(theirs_one)),
        "sample by sample": in_turns(lambda: timed(ours_one), lambda: timed(theirs_one)),
        "batches of 256": in_turns(lambda: timed(ours_batch), lambda: timed(theirs_one)),
        f"through the loader, {WORKERS} workers": in_turns(ours_loader, theirs_loader),
    }
    size, other = disk_bytes(cache), disk_bytes(mar_root)
    results["bytes on disk"] = {"ratio": size / other, "bytes": size, "against_bytes": other}
    loader = iter(LatentLoader(reader, stream, threads=WORKERS))
    memory = []
    for step, batch in enumerate(islice(loader, 1000)):
        consume(batch)
        if step >= 200 and step % 20 == 0:
            memory.append((step * BATCH, resident_bytes()))
    samples, held = np.array(memory, float).T
    slope = float(np.polyfit(samples, held, 1)[0])
    results["memory over the run"] = {
        "bytes_per_sample": slope,
        "samples": int(samples[-1]),
        "held_bytes": int(held[-1]),
    }
    return results


@timing.command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=timing.positive, default=20_000)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    options = parser.parse_args()
    if options.samples < BATCH:
        raise UserError(f"--samples {options.samples} is less than a batch of {BATCH}.", "Give more.")
    if options.folder is not None and not options.folder.is_dir():
        raise UserError(f"There is no folder '{options.folder}'.", "Make it, or leave --folder away.")
    options.threads, options.clock = 1, "wall"
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(Path(folder), options.samples)
    about = timing.machine(options, timing.CPU)
    print(json.dumps({**about, "samples": options.samples, "rates": "samples/s", "results": results}, indent=2))


if __name__ == "__main__":
    main()
