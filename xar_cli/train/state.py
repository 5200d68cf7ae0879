"""What a run carries from step to step: model, optimizer, averages; into a checkpoint and out of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xar_cli.checkpoint import Checkpoint, TensorGroups
from xar_cli.config.schema import Config
from xar_cli.model import XAR
from xar_cli.model.transformer import init_weights
from xar_cli.train.ema import WeightAverages, ema_group
from xar_cli.train.optimizer import build_optimizer, load_optimizer, optimizer_tensors


@dataclass
class TrainState:
    """Everything that changes while training. `step` counts the optimizer steps taken."""

    config: Config
    model: XAR
    optimizer: torch.optim.AdamW
    averages: WeightAverages
    step: int = 0

    @classmethod
    def fresh(cls, config: Config, device: torch.device) -> TrainState:
        """The state before step 0; weights follow from the seed alone, on any device."""
        model = XAR(config)
        init_weights(model, torch.Generator().manual_seed(config.train.seed))
        model.to(device).train()
        averages = WeightAverages(model.named_parameters(), config.train.ema_decays)
        return cls(config, model, build_optimizer(model, config.train), averages)

    def groups(self) -> TensorGroups:
        """All tensors by checkpoint group; the tensors themselves, not copies."""
        return {
            "model": dict(self.model.named_parameters()),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            **{ema_group(decay): self.averages.tensors(decay) for decay in self.config.train.ema_decays},
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Go back to the moment a checkpoint was written."""
        self.model.load_state_dict(checkpoint.tensors("model"), strict=True)
        load_optimizer(self.model, self.optimizer, checkpoint.tensors("optimizer"))
        for decay in self.config.train.ema_decays:
            self.averages.load(decay, checkpoint.tensors(ema_group(decay)))
        self.step = checkpoint.step
