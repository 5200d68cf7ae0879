"""The batch that fits: the search by itself, then real passes of a tiny network with memory that runs out."""

import functools

import pytest
import torch

from tests.caches import make_cache
from tests.runs import final_tensors, losses, settings, small_recipe
from xar_cli.checkpoint import latest_checkpoint
from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.run_dir import RunDir
from xar_cli.train import loop, probe
from xar_cli.train import step as step_module
from xar_cli.train.loop import train
from xar_cli.train.probe import divisors, find_batch, largest_that_fits, line_through, missing_optimizer_bytes
from xar_cli.train.state import TrainState

CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1, CPU)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "latents.h5")


def test_divisors():
    assert divisors(256) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("start", [1, 7, 8, 100, 10**6])
@pytest.mark.parametrize("limit", [0, 1, 3, 8, 100, 255, 256, 10**6])
def test_the_search_finds_the_largest_wherever_it_starts(start, limit):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = largest_that_fits(divisors(256), start, fits)
    assert found == max((batch for batch in divisors(256) if batch <= limit), default=None)
    assert len(tried) == len(set(tried)) <= 5
    assert tried[0] == max(batch for batch in divisors(256) if batch <= start)


def memory_of(monkeypatch, images):
    """Let memory suffice for passes of so many images; gives the list of batches that were tried."""
    tried, batch_loss = [], step_module.batch_loss

    def loss(model, config, grouping, moments, *rest):
        tried.append(moments.shape[0])
        if moments.shape[0] > images:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return batch_loss(model, config, grouping, moments, *rest)

    monkeypatch.setattr(step_module, "batch_loss", loss)
    monkeypatch.setattr(loop, "PROBED_DEVICES", ("cpu",))
    return tried


def auto(*overrides):
    return small_recipe("train.max_batch_per_rank=auto", *overrides)


def test_a_probed_run_is_the_run_with_that_batch(data, tmp_path, monkeypatch):
    """Dropout is on: the trials leave no gradient and no random state behind."""
    with monkeypatch.context() as patch:
        tried = memory_of(patch, images=2)
        train(settings(auto(), data, tmp_path / "probed"))
    assert tried[:4] == [8, 2, 2, 4]  # by estimate all eight, then bisection; two passes, to have gradients there
    train(settings(small_recipe("train.max_batch_per_rank=2"), data, tmp_path / "given"))
    found, expected = final_tensors(tmp_path / "probed"), final_tensors(tmp_path / "given")
    assert latest_checkpoint(RunDir(tmp_path / "probed")).state["batch_size_per_rank"] == 2
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert losses(tmp_path / "probed") == losses(tmp_path / "given")


def test_going_on_keeps_the_batch(data, tmp_path, monkeypatch):
    def stop(state, *rest, take_step=loop.take_step):
        if state.step == 6:
            raise KeyboardInterrupt
        take_step(state, *rest)

    with monkeypatch.context() as patch:
        memory_of(patch, images=2)
        patch.setattr(loop, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings(auto(), data, tmp_path / "run"))
    tried = memory_of(monkeypatch, images=8)  # now more would fit
    train(settings(auto(), data, tmp_path / "run"))
    assert set(tried) == {2}


def test_not_even_one_image(data, tmp_path, monkeypatch):
    memory_of(monkeypatch, images=0)
    with pytest.raises(UserError, match="pass of 1 images does not fit") as caught:
        train(settings(auto(), data, tmp_path / "run"))
    assert caught.value.exit_code == 1
    assert not (tmp_path / "run").exists()


def test_other_errors_are_not_taken_for_full_memory(data, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    memory_of(monkeypatch, images=8)
    monkeypatch.setattr(step_module, "batch_loss", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        train(settings(auto(), data, tmp_path / "run"))


def test_what_is_used_must_leave_headroom(monkeypatch):
    """100 bytes an image: 900 of them are 9 images, and 8 is the largest divisor below."""
    state, height = TrainState.fresh(auto("train.global_batch_size=32"), CPU), [0]
    monkeypatch.setattr(probe, "peak_bytes", lambda device: float(height[-1]))
    assert find_batch(state, ALONE, 32, lambda batch: height.append(100 * batch), budget=900) == 8


def test_the_optimizers_place_is_held_while_trying(monkeypatch):
    state, held = TrainState.fresh(auto(), CPU), []
    empty = torch.empty
    monkeypatch.setattr(probe.torch, "empty", lambda size, **how: held.append(size) or empty(size, **how))
    find_batch(state, ALONE, 8, lambda batch: None, budget=1)
    parameters = sum(parameter.nbytes for parameter in state.model.parameters())
    assert held == [2 * parameters]
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    assert missing_optimizer_bytes(state) == 0


def test_sharded_ranks_measure_two_small_batches_and_draw_a_line():
    measured = []

    def measure(batch):
        measured.append(batch)
        return 50.0 + 10 * batch

    line = line_through(1, 2, measure)
    assert [line(batch) for batch in (1, 2, 64)] == [60, 70, 690]
    assert measured == [1, 2]
    full = line_through(1, 2, lambda batch: float("inf") if batch > 1 else 5.0)
    assert largest_that_fits([1, 2, 4], 4, lambda batch: full(batch) <= 9) == 1
    assert largest_that_fits([1, 2], 1, lambda batch: line_through(1, 2, lambda _: float("inf"))(batch) <= 9) is None


def test_the_code_that_stays_is_compiled_for_one_batch(monkeypatch):
    """Batches of several sizes in turn would leave code for any size, which is slower."""
    from xar_cli.train import parallel

    dynamic = []

    def backend(graph, inputs, options=None):
        dynamic.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(parallel.torch, "compile", functools.partial(torch.compile, backend=backend))
    state = TrainState.fresh(auto("train.compile=true", "model.dropout=0"), CPU, ALONE)

    def passes(batch):
        state.wrapped(torch.zeros(batch, 64, 1), torch.zeros(batch, 4), torch.zeros(batch, dtype=torch.long))

    assert find_batch(state, ALONE, 4, passes, budget=1) == 8
    passes(8)
    assert not any(dynamic)
    passes(4)
    passes(2)
    assert any(dynamic)  # what would happen without forgetting


def test_no_gradient_of_a_trial_stays():
    """Neither of one that fits, nor of one that ran out of memory on the way back."""
    state, there = TrainState.fresh(auto(), CPU), []

    def trial(batch):
        there.append(any(parameter.grad is not None for parameter in state.model.parameters()))
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if batch > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    assert find_batch(state, ALONE, 8, trial, budget=1) == 2
    assert there == [False] * 3
    assert all(parameter.grad is None for parameter in state.model.parameters())
