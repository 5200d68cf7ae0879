"""Who this process is among its peers: rank, world size, device; joining and leaving the process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from xar_cli.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all processes of the job.

    Attributes:
        rank: number of this process, 0 to world_size - 1.
        local_rank: its number on this machine.
        world_size: processes in all.
        device: where its tensors live.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that logs and writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks; nothing on one rank."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, in place; the tensor itself on one rank."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: object) -> list[object]:
        """One picklable value from every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[object] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`: auto (CUDA where there is one), cpu, cuda or cuda:N.

    Raises:
        UserError: CUDA was asked for and is not there, or the name is none of these.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UserError(f"There is no device called '{name}'.", "Use auto, cpu, cuda or cuda:N.")
    number = int(index) if index else local_rank
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        raise UserError(f"Device 'cuda:{number}' is not here.", "Use --device cpu, or check `nvidia-smi`.")
    return torch.device("cuda", number)


@contextmanager
def process_group(device: str = "auto", timeout_minutes: float = 10) -> Iterator[Ranks]:
    """Join the job that the environment describes (RANK, WORLD_SIZE, ...), and leave it when the work ends or fails.

    Without those variables the process is alone. Backend: NCCL with CUDA devices, gloo otherwise.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    picked = pick_device(device, local_rank)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    ranks = Ranks(rank, local_rank, world_size, picked)
    if world_size == 1:
        yield ranks
        return
    backend = "nccl" if picked.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(minutes=timeout_minutes))
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
