"""The golden network's weights, as the files that people have."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xar_cli.config import Config, dump_config
from xar_cli.weights import from_published


@pytest.fixture(scope="session")
def published(golden) -> dict[str, torch.Tensor]:
    """The golden network's parameters under the published names; read-only."""
    return {name.removeprefix("state."): golden[name] for name in golden if name.startswith("state.")}


@pytest.fixture
def recipe_file(golden_config, tmp_path) -> Path:
    """The golden network's recipe."""
    path = tmp_path / "golden.yaml"
    path.write_text(dump_config(golden_config))
    return path


@pytest.fixture
def bare_file(published, tmp_path) -> Path:
    """As xAR-B.pth: a bare state dict with derived buffers, whose values do not matter."""
    path = tmp_path / "bare.pth"
    buffers = {"mask": torch.full((1, 1, 256, 256), torch.nan)}
    for stack in ("encoder", "decoder"):
        for index in range(2):
            prefix = f"{stack}_blocks.{index}.attn.rope."
            buffers[prefix + "freqs_cos"] = torch.full((256, 16), torch.nan)
    torch.save(published | buffers, path)
    return path


@pytest.fixture
def training_file(published, tmp_path) -> Path:
    """As the original's checkpoint-last.pth; the average is the weights plus one."""
    path = tmp_path / "checkpoint-last.pth"
    content = {
        "model": published,
        "model_ema": {name: tensor + 1 for name, tensor in published.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 399,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(lr=5e-5, model="xar_base", device="cuda", betas=[0.9, 0.96]),
    }
    torch.save(content, path)
    return path


@pytest.fixture
def run_folder(published, golden_config: Config, tmp_path) -> Path:
    """A run of ours with one checkpoint: raw weights, and two averages that add 1 and 2."""
    from xar_cli.checkpoint import write_checkpoint
    from xar_cli.run_dir import RunDir

    config = golden_config.model_copy(
        update={"train": golden_config.train.model_copy(update={"ema_decays": (0.9999, 0.9)})}
    )
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.config.write_text(dump_config(config))
    run.identity.write_text(json.dumps({"class_names": [f"class {i}" for i in range(1000)]}))
    groups = {
        group: from_published({name: tensor + add for name, tensor in published.items()}, config)
        for group, add in (("model", 0), ("ema-0.9999", 1), ("ema-0.9", 2))
    }
    write_checkpoint(run, 1234, groups, {})
    return run.root


def save_safetensors(state: dict[str, torch.Tensor], path: Path) -> Path:
    """Write tensors as they are, without metadata."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path
