"""How the model is spread over ranks and compiled: DDP, FSDP2, activation checkpointing, torch.compile per block.

Each is put on in place, so parameters keep their names. From the inside out, every block is: its forward pass,
compiled, recomputed in the backward pass, sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from xar_cli.compiler import has_compiler
from xar_cli.config.schema import TrainConfig
from xar_cli.distributed import Ranks, whole_tensor
from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.model import XAR

FSDP_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # it asks the device's streams for events; torch 2.6 has none


def require_parallel(train: TrainConfig, world_size: int, device: torch.device) -> None:
    """Raise a UserError where this torch cannot spread a model so: FSDP on the CPU, with torch 2.6."""
    if train.parallel == "fsdp" and world_size > 1 and device.type == "cpu" and not FSDP_ON_CPU:
        raise UserError(
            f"train.parallel=fsdp on a CPU needs a newer torch than {torch.__version__}.",
            "Use --set train.parallel=ddp, or `pip install --upgrade torch`.",
        )


def spread(model: XAR, train: TrainConfig, ranks: Ranks) -> nn.Module:
    """Make a model ready for training on these ranks; returns what to call for a forward pass."""
    if train.compile:
        compile_blocks(model)
    if train.activation_checkpointing:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if ranks.world_size == 1:
        return model
    if train.parallel == "fsdp":
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def compile_blocks(model: XAR) -> None:
    """Compile the blocks: one graph serves all layers. Without a C++ compiler they stay eager on a CPU.

    On a CPU they draw from torch's generator, as eager code does: see model/dropout.py.
    """
    if not has_compiler(model.rope.device):
        log.warning("No C++ compiler is installed: training runs uncompiled, which is slower.")
        return
    options: dict[str, Any] | None = {"fallback_random": True} if model.rope.device.type == "cpu" else None
    for block in model.blocks:
        block.forward = torch.compile(block.forward, options=options)


@contextmanager
def synchronised(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """A forward and backward pass; gradients meet those of the other ranks only in the `last` one of a step."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
        return
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    yield


def gradient_norm(model: nn.Module) -> Tensor:
    """Norm of the whole gradient, on every rank; stays on the device."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return whole_tensor(torch.nn.utils.get_total_norm(grads))


def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiply the gradient by a number that is on the device."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch._foreach_mul_([local_part(grad) for grad in grads], factor)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
