"""The loss scale of fp16 training, kept on the device: halved after a bad step, doubled after many good ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
GOOD_STEPS_TO_GROW = 2000


class LossScale:
    """What the loss is multiplied with before the backward pass, so that small gradients survive fp16.

    Like torch's GradScaler, but the verdict on a step comes from the norm of the whole gradient, which all ranks share.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL_SCALE, device=device)
        self._good_steps = torch.zeros((), device=device)

    def update(self, bad: Tensor) -> None:
        """Take account of one step; `bad` is a bool on the device, and nothing waits for it."""
        good_steps = torch.where(bad, 0, self._good_steps + 1)
        grow = good_steps >= GOOD_STEPS_TO_GROW
        self.scale = self.scale * torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0))
        self._good_steps = torch.where(grow, 0, good_steps)

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a checkpoint."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the state from a checkpoint."""
        device = self.scale.device
        self.scale, self._good_steps = tensors["scale"].to(device), tensors["good_steps"].to(device)
