"""Exponential moving averages of the weights, several decays at once.

Plain foreach arithmetic instead of `torch.optim.swa_utils.AveragedModel`: that one reads its step count from the
device at every update, which makes the host wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from xar_cli.distributed import assign


class WeightAverages:
    """One running average of all parameters per decay: average = decay * average + (1 - decay) * weight.

    Args:
        named_parameters: names and parameters of the model; the averages start at their present values.
        decays: each in [0, 1).
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], decays: Sequence[float]) -> None:
        self._parameters = dict(named_parameters)
        self._averages = {
            decay: [parameter.detach().clone() for parameter in self._parameters.values()] for decay in decays
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the present weights; call once after each optimizer step."""
        weights = [parameter.detach() for parameter in self._parameters.values()]
        for decay, averages in self._averages.items():
            torch._foreach_lerp_(averages, weights, 1 - decay)

    def tensors(self, decay: float) -> dict[str, Tensor]:
        """The average of one decay, by parameter name; the tensors themselves, not copies."""
        return dict(zip(self._parameters, self._averages[decay], strict=True))

    @torch.no_grad()
    def load(self, decay: float, tensors: Mapping[str, Tensor]) -> None:
        """Set the average of one decay."""
        for name, average in self.tensors(decay).items():
            assign(average, tensors[name])


def ema_group(decay: float) -> str:
    """Name of an average's tensor group in a checkpoint."""
    return f"ema-{decay!r}"
