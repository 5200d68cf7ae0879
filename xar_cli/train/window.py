"""What happened since the last record: sums that stay on the device until a logging step reads them all at once.

Legend: B images of a forward pass, K entities, N tokens.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xar_cli.distributed import Ranks
from xar_cli.train.draws import StepDraws

BUCKETS = 10  # of the timestep, equally wide
MAX_ENTITY_GROUPS = 16  # losses shown; more entities than this are shown in groups of neighbours


@dataclass(frozen=True)
class BadStep:
    """A step that was skipped because its loss or gradient was not finite.

    Attributes:
        step: number of the step, from 0.
        rows: places in the global batch of the images whose loss was not finite; empty if only the gradient was not.
    """

    step: int
    rows: tuple[int, ...]


class Window:
    """Sums over the steps since the last record.

    Args:
        ranks: who takes part; every rank must read the window at the same steps.
        lengths: tokens of each entity.
    """

    def __init__(self, ranks: Ranks, lengths: tuple[int, ...]) -> None:
        self._ranks, self._device = ranks, ranks.device
        self._entities = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(self._device)
        self._lengths = torch.tensor(lengths, dtype=torch.float32, device=self._device)
        self._groups = min(len(lengths), MAX_ENTITY_GROUPS)
        self._bad_in_a_row = 0
        self._clear()

    @property
    def steps(self) -> int:
        """Steps since the last record."""
        return len(self._bad)

    def add_losses(self, losses: Tensor, draws: StepDraws, rows: slice) -> None:
        """Count one forward pass: losses (B, N), for the images at `rows` of the global batch."""
        losses = losses.detach()
        of_entity = losses.new_zeros(losses.shape[0], len(self._lengths)).index_add_(1, self._entities, losses)
        of_entity = of_entity / self._lengths  # (B, K)
        finite = torch.isfinite(of_entity)
        values, counts = torch.where(finite, of_entity, 0), finite.float()
        bucket = (draws.t * BUCKETS).long().clamp_(max=BUCKETS - 1).flatten()
        self._of_bucket[0].index_add_(0, bucket, values.flatten())
        self._of_bucket[1].index_add_(0, bucket, counts.flatten())
        self._of_entity[0] += values.sum(0)
        self._of_entity[1] += counts.sum(0)
        self._bad_rows[-1].append((rows, ~finite.all(1)))

    def begin_step(self) -> None:
        """Call before the forward passes of a step."""
        self._bad_rows.append([])

    def end_step(self, loss: Tensor, grad_norm: Tensor, bad: Tensor, lr: float) -> None:
        """Count one optimizer step: this rank's mean loss, the norm of the whole gradient, whether it was skipped."""
        self._loss.append(loss)
        self._grad_norm.append(grad_norm)
        self._bad.append(bad)
        self.lr = lr

    def read(self, step: int, images_per_step: int) -> tuple[dict[str, Any], list[BadStep]]:
        """The record of this window and its bad steps, with one wait for the device; the next window begins.

        Every rank calls this and gets the same values.
        """
        loss, grad_norm, bad = (torch.stack(values).float() for values in (self._loss, self._grad_norm, self._bad))
        loss = torch.where(bad.bool(), 0, loss) / self._ranks.world_size
        shared = self._ranks.sum(torch.cat([loss, self._of_bucket.flatten(), self._of_entity.flatten()]))
        numbers = torch.cat([grad_norm, bad, shared]).tolist()  # the one wait
        seconds = time.monotonic() - self._began
        steps, buckets = self.steps, 2 * BUCKETS
        grad_norms, bad_flags, losses = numbers[:steps], numbers[steps : 2 * steps], numbers[2 * steps : 3 * steps]
        of_bucket, of_entity = numbers[3 * steps : 3 * steps + buckets], numbers[3 * steps + buckets :]
        bad_steps = self._bad_steps(step - steps, bad_flags) if any(bad_flags) else []
        for flag in bad_flags:
            self._bad_in_a_row = self._bad_in_a_row + 1 if flag else 0
        good = [norm for norm in grad_norms if math.isfinite(norm)]
        record = {
            "step": step,
            "loss": sum(losses) / (steps - len(bad_steps)) if len(bad_steps) < steps else None,
            "lr": self.lr,
            "grad_norm": sum(good) / len(good) if good else None,
            "grad_norm_max": max(good) if good else None,
            "images_per_second": steps * images_per_step / seconds,
            "skipped_steps": len(bad_steps),
            "bad_steps_in_a_row": self._bad_in_a_row,
            "loss_by_t": _means(of_bucket, BUCKETS),
            "loss_by_entity": _means(of_entity, self._groups),
        }
        if self._device.type == "cuda":
            record["memory_bytes"] = torch.cuda.max_memory_allocated(self._device)
        self._clear()
        return record, bad_steps

    def pause(self) -> float:
        """Call before work that is no training step (a preview, say); gives what `resume` takes."""
        return time.monotonic()

    def resume(self, paused: float) -> None:
        """Leave the time since `pause` out of the images per second."""
        self._began += time.monotonic() - paused

    def _bad_steps(self, first_step: int, flags: list[float]) -> list[BadStep]:
        mine = {
            number: [row for rows, bad in self._bad_rows[number] for row in _where(rows, bad)]
            for number, flag in enumerate(flags)
            if flag
        }
        everyones: list[Any] = self._ranks.gather(mine)
        return [
            BadStep(first_step + number, tuple(sorted(row for rows in everyones for row in rows[number])))
            for number in mine
        ]

    def _clear(self) -> None:
        entities = len(self._lengths)
        self._of_bucket = torch.zeros(2, BUCKETS, device=self._device)
        self._of_entity = torch.zeros(2, entities, device=self._device)
        self._loss: list[Tensor] = []
        self._grad_norm: list[Tensor] = []
        self._bad: list[Tensor] = []
        self._bad_rows: list[list[tuple[slice, Tensor]]] = []
        self._began = time.monotonic()


def _where(rows: slice, bad: Tensor) -> list[int]:
    return [rows.start + place for place in bad.nonzero().flatten().tolist()]


def _means(sums_and_counts: list[float], groups: int) -> list[float | None]:
    """Mean of each group of neighbours, from all sums and then all counts; None where nothing was counted."""
    half = len(sums_and_counts) // 2
    edges = [half * group // groups for group in range(groups + 1)]
    means: list[float | None] = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        count = sum(sums_and_counts[half + start : half + end])
        means.append(sum(sums_and_counts[start:end]) / count if count else None)
    return means
