"""What a run carries from step to step: model, optimizer, averages; into a checkpoint and out of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from xar_cli.checkpoint import Checkpoint, TensorGroups
from xar_cli.config.schema import Config
from xar_cli.distributed import Ranks, assign
from xar_cli.model import XAR
from xar_cli.model.transformer import init_weights
from xar_cli.train.ema import WeightAverages, ema_group
from xar_cli.train.loss_scale import LossScale
from xar_cli.train.optimizer import build_optimizer, load_optimizer, optimizer_tensors
from xar_cli.train.parallel import spread

_LOSS_SCALE = "loss-scale"  # tensor group


@dataclass
class TrainState:
    """Everything that changes while training.

    Attributes:
        config: the recipe.
        model: the network; its parameters may be shards.
        wrapped: what to call for a forward pass.
        optimizer: AdamW over the model's parameters.
        averages: of the weights.
        loss_scale: for fp16, else None.
        step: optimizer steps taken.
    """

    config: Config
    model: XAR
    wrapped: nn.Module
    optimizer: torch.optim.AdamW
    averages: WeightAverages
    loss_scale: LossScale | None
    step: int = 0

    @classmethod
    def fresh(cls, config: Config, device: torch.device, ranks: Ranks | None = None) -> TrainState:
        """The state before step 0; weights follow from the seed alone, on any device.

        With `ranks` the model is also compiled and spread over them as the recipe says.
        """
        model = XAR(config)
        init_weights(model, torch.Generator().manual_seed(config.train.seed))
        model.to(device).train()
        model.grouping = model.grouping.to(device)
        wrapped = spread(model, config.train, ranks) if ranks else model
        return cls(
            config,
            model,
            wrapped,
            build_optimizer(model, config.train),
            WeightAverages(model.named_parameters(), config.train.ema_decays),
            LossScale(device) if config.train.precision == "fp16" else None,
        )

    def groups(self) -> TensorGroups:
        """All tensors by checkpoint group; the tensors themselves, not copies."""
        return {
            "model": dict(self.model.named_parameters()),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            **{ema_group(decay): self.averages.tensors(decay) for decay in self.config.train.ema_decays},
            **({_LOSS_SCALE: self.loss_scale.tensors()} if self.loss_scale else {}),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Go back to the moment a checkpoint was written, by any number of ranks."""
        for name, tensor in checkpoint.tensors("model").items():
            assign(self.model.get_parameter(name), tensor)
        load_optimizer(self.model, self.optimizer, checkpoint.tensors("optimizer"))
        for decay in self.config.train.ema_decays:
            self.averages.load(decay, checkpoint.tensors(ema_group(decay)))
        if self.loss_scale and _LOSS_SCALE in checkpoint.groups:  # absent where the precision was changed
            self.loss_scale.load(checkpoint.tensors(_LOSS_SCALE))
        self.step = checkpoint.step
