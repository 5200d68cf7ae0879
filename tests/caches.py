"""Small latent caches, image folders and the recipe that fits them, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from xar_cli.config import Config, load_recipe
from xar_cli.data.cache_file import CacheLayout, create_cache, hash_source
from xar_cli.data.latents import LatentWriter

N = 37
PIXEL_OVERRIDES = (
    "data={dataset: noise, image_size: 8, image_channels: 1, num_classes: 10, num_images: 37}",
    "tokenizer={kind: pixels, patch: 1, latent_scale: 1.0}",
    "entity.size=4",
)
NAMES = [b"%03d.png" % i for i in range(N)]
LABELS = np.arange(N, dtype=np.int64) % 10


def make_layout(**changes) -> CacheLayout:
    values = {
        "num_samples": N, "latent_channels": 1, "grid": (8, 8), "dtype": "float16", "flip": True,
        "tokenizer": "pixels/p1", "precision": "fp32", "latent_scale": 1.0,
        "image_size": 8, "image_channels": 1,
        "crop": "adm-centre", "source": hash_source(NAMES, LABELS),
    }  # fmt: skip
    return CacheLayout(**{**values, **changes})


def make_moments(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, N, 2, 8, 8)).astype(np.float32)


CLASSES = [f"digit-{i}".encode() for i in range(10)]


def make_cache(path, layout=None, num_shards=1, finish=True, skip=()):
    layout = layout or make_layout()
    create_cache(path, layout, NAMES, LABELS, CLASSES, num_shards=num_shards)
    if finish:
        image, mirror = make_moments().reshape(2, N, *layout.row_shape)
        with LatentWriter(path) as writer:
            rows = np.array([row for row in range(N) if row not in skip], np.int64)
            writer.write(rows, image[rows], mirror[rows] if layout.flip else None)
            for row in skip:
                writer.mark_bad(row)
            writer.commit()
    return path


def pixel_recipe(*overrides: str) -> Config:
    """A recipe for grey images of 8 x 8 pixels in 10 classes, every pixel a token."""
    return load_recipe("tiny", [*PIXEL_OVERRIDES, *overrides])


def make_images(root: Path, num_classes: int = 3, per_class: int = 9, side: int = 8) -> Path:
    """A folder of grey PNGs of random pixels: class-0/000.png and so on."""
    rng = np.random.default_rng(0)
    for label in range(num_classes):
        (root / f"class-{label}").mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (side, side), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class-{label}" / f"{i:03d}.png")
    return root
