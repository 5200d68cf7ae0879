"""`xar sample` on a network so small that an image takes a millisecond, for tests."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from xar_cli.cli.app import main
from xar_cli.config import Config, dump_config
from xar_cli.config.recipes import load_recipe
from xar_cli.model import XAR
from xar_cli.model.transformer import init_weights
from xar_cli.sample.images import image_path

OVERRIDES = ["model={dim: 16, depth: 1, heads: 2}", "sample.num_steps=2", "sample.batch_size=7", "train.precision=fp32"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # for processes; two of several threads spin against each other


def small_config() -> Config:
    return load_recipe("tiny", OVERRIDES)


def small_weights(folder: Path, fill: float | None = None) -> list[str]:
    """Options that name an untrained network; all its weights can be one number."""
    config = small_config()
    model = XAR(config)
    init_weights(model, torch.Generator().manual_seed(0))
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    if fill is not None:
        tensors = {name: torch.full_like(tensor, fill) for name, tensor in tensors.items()}
    save_file(tensors, folder / "small.safetensors")
    (folder / "small.yaml").write_text(dump_config(config))
    return ["--weights", str(folder / "small.safetensors"), "--recipe", str(folder / "small.yaml")]


def xar(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def sample(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert xar("sample", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: object, code: int = 2) -> str:
    """What `xar sample` said, in one line."""
    capsys.readouterr()
    assert xar("sample", *arguments) == code
    return " ".join(capsys.readouterr().err.split())


def command(*arguments: object) -> list[str]:
    """`xar sample` as a process of its own."""
    return [sys.executable, "-m", "xar_cli", "sample", *map(str, arguments)]


def pixels(folder: Path, count: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(image_path(folder, index))) for index in range(count)])
