"""Who reads which sample when: the endless stream of shuffled epochs, and the share of one rank in one step.

Owns the order alone. It opens no file and knows no tensor: a step number is all the state there is, so a run
that resumes at step 70,000 reads what it would have read without the interruption.
"""

from __future__ import annotations

import numpy as np


class SampleStream:
    """An endless stream of sample indices: one permutation of all samples per epoch, epoch after epoch.

    Optimizer step s takes positions [s * G, (s + 1) * G) of the stream, so a step may span the end of an
    epoch and no sample is ever dropped. The order depends on (num_samples, seed) alone, not on ranks, batches
    or restarts.

    Args:
        num_samples: samples N in the cache, 1 or more.
        global_batch_size: samples G of one optimizer step over all ranks, 1 or more.
        seed: seed of the order, 0 or more.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int) -> None:
        if num_samples < 1 or global_batch_size < 1:
            raise ValueError(f"need samples and a batch, got {num_samples} samples in batches of {global_batch_size}")
        self.num_samples, self.global_batch_size, self.seed = num_samples, global_batch_size, seed
        self._permutations: dict[int, np.ndarray] = {}

    def epoch(self, step: int) -> float:
        """Passes over the data that are complete when step `step` begins."""
        return step * self.global_batch_size / self.num_samples

    def indices(self, step: int) -> np.ndarray:
        """The samples of optimizer step `step` over all ranks: int64 (global_batch_size,)."""
        position, end = step * self.global_batch_size, (step + 1) * self.global_batch_size
        parts = []
        while position < end:
            epoch, first = divmod(position, self.num_samples)
            part = self._permutation(epoch)[first : first + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        """The order of one epoch, from (seed, epoch); the two newest are kept, for steps that span both."""
        order = self._permutations.get(epoch)
        if order is None:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples).astype(np.int64, copy=False)
            kept = {old: value for old, value in self._permutations.items() if old == epoch - 1}
            self._permutations = {**kept, epoch: order}
        return order


def micro_batch(
    global_batch_size: int, rank: int, world_size: int, micro_step: int = 0, accumulation_steps: int = 1
) -> slice:
    """The part of a step's samples that one rank takes in one micro-step.

    A step is cut into accumulation_steps * world_size equal runs, in order; micro-step a of rank r takes run
    a * world_size + r. All runs together are the whole step, whatever the number of ranks or micro-steps, and
    they apply alike to everything drawn per sample of the step (indices, flips, timesteps).

    Raises:
        ValueError: for a batch that does not divide evenly, or a rank or micro-step out of range.
    """
    if not (0 <= rank < world_size and 0 <= micro_step < accumulation_steps):
        raise ValueError(f"no rank {rank} of {world_size} or micro-step {micro_step} of {accumulation_steps}")
    size, rest = divmod(global_batch_size, world_size * accumulation_steps)
    if rest or not size:
        raise ValueError(
            f"a global batch of {global_batch_size} cannot be divided over {world_size} ranks x "
            f"{accumulation_steps} micro-steps"
        )
    first = (micro_step * world_size + rank) * size
    return slice(first, first + size)
