"""Ranks that are threads of this process, for tests of what several ranks say to each other."""

from __future__ import annotations

import threading

import torch

from xar_cli.distributed import Ranks
from xar_cli.errors import UserError


class ThreadRanks(Ranks):
    """One of several ranks that are threads."""

    meeting: threading.Barrier
    said: list  # by each rank, the last time they met

    def barrier(self) -> None:
        """Wait for the other threads."""
        self.meeting.wait(timeout=60)

    def gather(self, value):
        """One value from every thread, in rank order."""
        self.said[self.rank] = value
        self.barrier()
        values = list(self.said)
        self.barrier()  # all have heard them before anybody says something else
        return values

    def on_main(self, compute):
        """What `compute` gives on rank 0; a UserError there is raised in all threads."""
        value = error = None
        if self.is_main:
            try:
                value = compute()
            except UserError as fault:
                error = fault
        value, error = self.gather((value, error))[0]
        if error is not None:
            raise error
        return value


def thread_ranks(world_size: int) -> list[ThreadRanks]:
    """The ranks of one job on one machine."""
    meeting, said = threading.Barrier(world_size), [None] * world_size
    ranks = [ThreadRanks(rank, rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    for one in ranks:
        object.__setattr__(one, "meeting", meeting)
        object.__setattr__(one, "said", said)
    return ranks
