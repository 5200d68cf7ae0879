"""AdamW as the paper uses it, and its state as named tensors for checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xar_cli.config.schema import TrainConfig
from xar_cli.distributed import assign


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on parameters of two or more dimensions other than biases, none on the rest."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by `parameter name/state name`; the tensors themselves, not copies."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Set the optimizer's state from what `optimizer_tensors` gave, sharded as the parameters are."""
    by_name: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        by_name[name][key] = value
    for name, parameter in model.named_parameters():
        state: dict[str, Tensor] = {}
        for key, value in by_name.get(name, {}).items():
            if value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, requires_grad=False)
                assign(state[key], value)
            else:
                state[key] = value.to(parameter.device)  # the step count
        optimizer.state[parameter] = state
