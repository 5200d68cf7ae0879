"""A training run small enough for a test: a network of a few thousand weights on a cache of 37 random images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.caches import pixel_recipe
from xar_cli.checkpoint import latest_checkpoint
from xar_cli.config import Config
from xar_cli.logs import read_metrics
from xar_cli.run_dir import RunDir
from xar_cli.train import loop
from xar_cli.train.loop import TrainSettings

SMALL = (
    "model={dim: 16, depth: 1, heads: 2, dropout: 0.1}",
    "data.mirror=true",
    "train.global_batch_size=8",
    "train.max_batch_per_rank=8",
    "train.epochs=2",  # 10 steps: an epoch ends inside step 4
    "train.base_lr=0.03",
    "train.log_every=1",
    "train.checkpoint_every=4",
    "train.ema_decays=[0.9, 0.5]",
    "sample.num_steps=2",
    "sample.batch_size=8",
)


def small_recipe(*overrides: str) -> Config:
    """10 steps of 8 images, dropout on, mirror images, two averages."""
    return pixel_recipe(*SMALL, *overrides)


def settings(config: Config, data: Path, out: Path, **more) -> TrainSettings:
    return TrainSettings(config=config, data=data, out=out, device="cpu", **more)


def train_until(monkeypatch: pytest.MonkeyPatch, step: int, *arguments, **more) -> None:
    """Train, and die when optimizer step `step` is about to be taken."""

    def die(state, *rest, take_step=loop.take_step):
        if state.step == step:
            raise KeyboardInterrupt
        take_step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", die)
        with pytest.raises(KeyboardInterrupt):
            loop.train(settings(*arguments, **more))


def losses(out: Path) -> dict[int, float]:
    """Loss of every logged step."""
    return {record["step"]: record["loss"] for record in read_metrics(RunDir(out).metrics) if "loss" in record}


def final_tensors(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, by group and name."""
    checkpoint = latest_checkpoint(RunDir(out))
    assert checkpoint is not None
    return {f"{group}/{name}": t for group in checkpoint.groups for name, t in checkpoint.tensors(group).items()}


def damage(out: Path, *steps: int) -> None:
    """Tear a file of some checkpoints of a run."""
    for step in steps:
        (out / "checkpoints" / f"step-{step:08d}" / "model.safetensors").write_bytes(b"torn")
