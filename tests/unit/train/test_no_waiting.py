"""Nothing in a step makes the host wait for the device: counted from a trace (tests/gpu lets CUDA itself watch).

What would wait on a GPU: reading a value (`.item()`, a condition on a tensor, positions of what is true) and making a
tensor from Python numbers, which is copied from memory that is not pinned.
"""

from collections import Counter
from itertools import repeat

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runs import small_recipe
from xar_cli.distributed import Ranks
from xar_cli.model.entities import build_grouping
from xar_cli.train import step as step_module
from xar_cli.train.objective import per_token
from xar_cli.train.plan import make_plan
from xar_cli.train.state import TrainState
from xar_cli.train.step import take_step
from xar_cli.train.window import Window

CPU = torch.device("cpu")
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "_unique2", "bincount",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts the kernels that would make the host wait."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def steps(config, device):
    """A function that takes a step of a run on a batch that is there."""
    ranks = Ranks(0, 0, 1, device)
    state, plan = TrainState.fresh(config, device, ranks), make_plan(config, 1, 37)
    window = Window(ranks, state.model.grouping.lengths)
    batch = torch.zeros(plan.batch_size_per_rank, 2, 8, 8), torch.arange(plan.batch_size_per_rank)
    batches = repeat(tuple(tensor.pin_memory() if device.type == "cuda" else tensor for tensor in batch))
    return state, lambda: take_step(state, plan, batches, ranks, window)


RECIPES = {
    "plain": (),
    "accumulated": ("train.max_batch_per_rank=2",),
    "fp16": ("train.precision=fp16",),
    "scales": ("entity={kind: scale, sizes: [2, 4, 8]}",),
    "clean context": ("train.context=clean",),
    "recomputed": ("train.activation_checkpointing=true", "model.dropout=0"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_reads_nothing_back(name):
    _, step = steps(small_recipe(*RECIPES[name]), CPU)
    step()  # masks and the optimizer's state are made once
    with Waits() as waits:
        step()
    assert not waits.found


def test_the_count_sees_what_waits(monkeypatch):
    """The test above could fail: reading the loss is noticed, and so are lengths made into a tensor."""
    _, step = steps(small_recipe(), CPU)
    step()
    backward = step_module.backward

    def reads(*arguments):
        loss = backward(*arguments)
        torch.tensor([1, 2])
        loss.item()
        return loss

    monkeypatch.setattr(step_module, "backward", reads)
    with Waits() as waits:
        step()
    assert waits.found == {"_local_scalar_dense": 1, "lift_fresh": 1}


@pytest.mark.parametrize("lengths", [(2, 2, 2), (1, 4, 2)])
def test_timesteps_per_token(lengths):
    t = torch.rand(3, 3)
    assert per_token(t, lengths).equal(torch.repeat_interleave(t, torch.tensor(lengths), dim=1))


@pytest.mark.parametrize("entity", ["{kind: cell, size: 4}", "{kind: scale, sizes: [2, 4, 8]}"])
def test_the_grouping_lies_on_the_device(entity):
    config = small_recipe(f"entity={entity}")
    moved = build_grouping(config.entity, config.grid).to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)
