"""What `xar sample` was asked for, in the form that crosses the process border."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from xar_cli.config.schema import Config, Section

Pack = Literal["npz", "hdf5"]


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
        packs: files to make of all images besides the PNGs.
        grid: columns and rows of a picture of the first images, or None.
        picture: where the picture of the grid goes, or that of `explain`; None is beside `out`.
        tokenizer_weights: file or hf:// name of KL-16's weights.
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
    packs: tuple[Pack, ...] = ()
    grid: tuple[int, int] | None = None
    picture: Path | None = None
    tokenizer_weights: Path | None = None
    device: str = "auto"
