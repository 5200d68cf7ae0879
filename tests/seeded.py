"""Weights made from a seed, for tests: the real ones cannot be shipped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "parity" / "golden"


def seeded_state(shapes: Mapping[str, Sequence[int]], seed: int = 11) -> dict[str, torch.Tensor]:
    """Tensors of the given shapes, drawn in name order: norms about 1, the rest of unit gain."""
    rng = np.random.default_rng(seed)
    state = {}
    for name in sorted(shapes):
        shape = shapes[name]
        w = rng.standard_normal(shape, dtype=np.float32)
        if "norm" in name and name.endswith("weight"):
            w = 1 + 0.1 * w
        elif name.endswith("bias"):
            w = 0.1 * w
        else:
            w = w / math.sqrt(math.prod(shape[1:]))
        state[name] = torch.from_numpy(np.asarray(w, dtype=np.float32))
    return state


@lru_cache(maxsize=1)
def kl16_shapes() -> dict[str, list[int]]:
    """Names and shapes of the published kl16.ckpt."""
    return json.loads((GOLDEN / "kl16_state_shapes.json").read_text())


@lru_cache(maxsize=1)
def kl16_state() -> dict[str, torch.Tensor]:
    """The seeded KL-16 weights of the golden file (66 M values, about a second); treat as read-only."""
    return seeded_state(kl16_shapes())
