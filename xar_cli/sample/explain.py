"""`xar sample --explain`: one image on its way from noise, entity by entity and step by step, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from xar_cli.distributed import process_group
from xar_cli.model.entities import Grouping
from xar_cli.sample.images import to_pil
from xar_cli.sample.noise import balanced_label
from xar_cli.sample.settings import SampleSettings
from xar_cli.sample.stage import describe_settings, draw_images, load_codec, load_network, save_picture
from xar_cli.weights import open_weights

T = TypeVar("T")
MAX_ROWS, MAX_COLUMNS = 8, 8
TILE, GAP, CAPTION, MARGIN = 112, 4, 18, 92  # pixels of the picture; TILE is the longer side of an image in it


@dataclass(frozen=True)
class Moment:
    """The image as it stood when one entity had reached timestep t: latents (C, H, W)."""

    entity: int
    t: float
    latents: Tensor


def explain(settings: SampleSettings) -> dict[str, Any]:
    """Draw image 0 of the settings and save the picture of its making as `settings.picture`.

    A row is an entity (at most 8 of them, evenly chosen), a column a timestep: finished entities, the one under way,
    and zeros where nothing has come yet, all decoded as the image would be.

    Returns:
        What `--json` prints; nothing on other ranks than the first, which have no part in it.

    Raises:
        UserError: weights that do not fit, an image that is not finite, a picture that cannot be written.
    """
    assert settings.picture is not None
    with process_group(settings.device) as ranks:
        if not ranks.is_main:
            return {}
        config = settings.config
        weights = open_weights(settings.weights, config, ema=settings.ema)
        codec = load_codec(settings, ranks.device)
        label = balanced_label(settings.seed, 0, settings.classes)
        network = load_network(config, lambda: weights.load(ranks.device), 1)
        record = Recorder(network.grouping)
        draw_images(config, network, codec, settings.seed, [0], [label], ranks.device, record.note)
        rows = choose(record.moments, network.grouping.num_entities)
        tiles = [[codec.images(moment.latents[None])[0].cpu().numpy() for moment in row] for row in rows]
    save_picture(picture(rows, tiles, network.grouping.num_entities), settings.picture)
    return {"picture": str(settings.picture)}


def describe_explain(settings: SampleSettings) -> list[tuple[str, str]]:
    """What would be done, as rows of a table for people; nothing is written."""
    label = balanced_label(settings.seed, 0, settings.classes)
    return describe_settings(settings.model_copy(update={"count": 1, "classes": (label,), "out": settings.picture}))


class Recorder:
    """Keeps what the sampler shows of the first image of a batch."""

    def __init__(self, grouping: Grouping) -> None:
        self.moments: list[Moment] = []
        self._grouping = grouping
        self._done: list[Tensor] = []

    def note(self, entity: int, t: float, x: Tensor) -> None:
        """An observer of the sampler; the entity's result comes last, with t = 0.

        Heun's solver evaluates a timestep twice, at its guess and where the step arrived: the latter stays.
        """
        del self._done[entity:]
        self._done.append(x[:1].float())
        if self.moments and (self.moments[-1].entity, self.moments[-1].t) == (entity, t):
            self.moments.pop()
        latents = self._grouping.partial_latents(torch.cat(self._done, dim=1))
        self.moments.append(Moment(entity, t, latents[0]))


def choose(moments: list[Moment], num_entities: int) -> list[list[Moment]]:
    """Evenly chosen moments of evenly chosen entities, the first and the last always among them."""
    rows = []
    for entity in evenly(range(num_entities), MAX_ROWS):
        rows.append(evenly([moment for moment in moments if moment.entity == entity], MAX_COLUMNS))
    return rows


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items at even distances, first and last included."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def picture(rows: list[list[Moment]], tiles: list[list[np.ndarray]], num_entities: int) -> Image.Image:
    """The tiles in rows and columns, with entity and timestep written beside and above them.

    Args:
        rows: the moments, row by row.
        tiles: their images, (channels, H, W) uint8, all of one size.
        num_entities: K, for the captions.
    """
    tile_height, tile_width = tile_size(*tiles[0][0].shape[1:])
    columns = max(len(row) for row in rows)
    width, height = MARGIN + columns * (tile_width + GAP), len(rows) * (tile_height + CAPTION + GAP)
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for number, (row, images) in enumerate(zip(rows, tiles, strict=True)):
        top = number * (tile_height + CAPTION + GAP)
        text = f"entity {row[0].entity + 1}\nof {num_entities}"
        pen.multiline_text((6, top + CAPTION + tile_height // 2 - 16), text, fill="black", font=font)
        for column, (moment, image) in enumerate(zip(row, images, strict=True)):
            left = MARGIN + column * (tile_width + GAP)
            pen.text((left + 2, top), f"t = {moment.t:.2f}", fill="black", font=font)
            small = max(image.shape[1:]) < TILE
            resample = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            tile = to_pil(image).convert("RGB").resize((tile_width, tile_height), resample)
            canvas.paste(tile, (left, top + CAPTION))
    return canvas


def tile_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of an image in the picture: its own proportions, with the longer side TILE."""
    longest = max(height, width)
    return max(1, round(height * TILE / longest)), max(1, round(width * TILE / longest))
