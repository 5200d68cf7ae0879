"""Training on a GPU: the numbers of the CPU, every precision, exact resume, and nothing that waits for the device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import repeat

import pytest
import torch

from tests.caches import make_cache
from tests.parity.test_xar import relative_error
from tests.runs import final_tensors, losses, settings, small_recipe
from tests.unit.train.test_no_waiting import RECIPES, steps
from xar_cli.distributed import Ranks
from xar_cli.flow import interpolant
from xar_cli.logs import read_metrics
from xar_cli.model.dropout import dropout
from xar_cli.model.transformer import init_weights
from xar_cli.run_dir import RunDir
from xar_cli.train.draws import StepDraws, draw_step
from xar_cli.train.loop import train
from xar_cli.train.objective import batch_loss
from xar_cli.train.plan import make_plan
from xar_cli.train.state import TrainState
from xar_cli.train.step import take_step
from xar_cli.train.window import Window

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PLAIN = ("model={dim: 64, depth: 1, heads: 2, dropout: 0.0}",)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "latents.h5")


def train_on_gpu(data, out, *overrides, **more):
    """A run of 10 steps; its losses by step."""
    train(settings(small_recipe(*overrides), data, out, **more).model_copy(update={"device": "cuda"}))
    return losses(out)


def test_golden_velocity_and_loss(golden, golden_model):
    model = golden_model.cuda()
    golden = {name: tensor.cuda() for name, tensor in golden.items() if name.startswith("train.")}
    x, noise = model.grouping.to_tokens(golden["train.latents"]), golden["train.noise"].flatten(1, 2)
    t = golden["train.timesteps"]
    x_t = interpolant.noisy_latent(x, noise, t.repeat_interleave(64, dim=1)[..., None])
    with torch.no_grad():
        velocity = model(x_t, t, golden["train.labels"])
    assert relative_error(velocity, golden["train.velocity"]) <= 1e-5
    loss = (velocity - interpolant.target_velocity(x, noise)).square().mean()
    assert relative_error(loss, golden["train.loss"][0]) <= 1e-5


@pytest.mark.parametrize("context", ["random", "clean"])
@pytest.mark.parametrize("entity", ["{kind: cell, size: 4}", "{kind: token}", "{kind: scale, sizes: [2, 4, 8]}"])
def test_gradients_are_those_of_the_cpu(entity, context):
    config = small_recipe(*PLAIN, f"entity={entity}", f"train.context={context}", "model.dropout=0")
    found = {}
    for device in (CPU, CUDA):
        state = TrainState.fresh(config, CPU, Ranks(0, 0, 1, CPU))
        model = state.model
        init_weights(model, torch.Generator().manual_seed(3))
        draws = draw_step(config, model.grouping, 0, CPU)
        draws = StepDraws(**{name: tensor.to(device) for name, tensor in vars(draws).items()})
        model.to(device)
        model.grouping = model.grouping.to(device)
        moments, labels = torch.ones(8, 2, 8, 8, device=device), torch.arange(8, device=device)
        batch_loss(model, config, model.grouping, moments, labels, draws).mean().backward()
        found[device] = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    for name, gradient in found[CPU].items():
        torch.testing.assert_close(found[CUDA][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_every_precision_trains_alike(precision, data, tmp_path):
    exact = train_on_gpu(data, tmp_path / "fp32", *PLAIN, "train.precision=fp32")
    found = train_on_gpu(data, tmp_path / precision, *PLAIN, f"train.precision={precision}")
    assert list(found) == list(exact)
    skipped = [step for step, loss in found.items() if loss is None]  # where fp16's first loss scales are too large
    assert skipped == list(range(1, len(skipped) + 1))
    assert len(skipped) <= (5 if precision == "fp16" else 0)
    for step in range(len(skipped) + 1, 11):
        assert found[step] == pytest.approx(exact[step - len(skipped)], rel=0.3 if skipped else 0.03)
    records = read_metrics(RunDir(tmp_path / precision).metrics)
    assert all(record["memory_bytes"] > 0 for record in records if "loss" in record)


@pytest.mark.parametrize(("probability", "tolerance"), [(0, 1e-3), (0.1, 0.1)])
def test_compiled_blocks_train_alike(probability, tolerance, data, tmp_path):
    """With dropout, eager and compiled code draw other masks."""
    recipe = (*PLAIN, "train.precision=fp32", f"model.dropout={probability}")
    eager = train_on_gpu(data, tmp_path / "eager", *recipe)
    compiled = train_on_gpu(data, tmp_path / "compiled", *recipe, "train.compile=true")
    for step, loss in eager.items():
        assert compiled[step] == pytest.approx(loss, rel=tolerance)


def test_compiled_dropout():
    """What it lets through is what it lets back; drawn from torch's generator."""
    compiled = torch.compile(lambda x: dropout(x, 0.1))

    def drawn(seed):
        torch.manual_seed(seed)
        x = torch.ones(1 << 20, device=CUDA, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert torch.equal(x.grad, y.detach())
        return y.detach()

    first = drawn(1)
    assert (first != 0).float().mean().item() == pytest.approx(0.9, abs=2e-3)
    assert first.mean().item() == pytest.approx(1, abs=2e-3)
    assert torch.equal(first, drawn(1))
    assert not torch.equal(first, drawn(2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_same_run(precision, data, tmp_path):
    """Killed after the checkpoint of step 4, with dropout on."""
    kept = ("train.keep_last=9", f"train.precision={precision}")
    train_on_gpu(data, tmp_path / "whole", *kept)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (8, 10):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    train_on_gpu(data, tmp_path / "cut", *kept)
    whole, cut = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "cut")
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_that_is_not_finite_changes_nothing():
    """The fused optimizer reads on the device that it shall do nothing."""
    config, ranks = small_recipe("train.precision=bf16"), Ranks(0, 0, 1, CUDA)
    state, plan = TrainState.fresh(config, CUDA, ranks), make_plan(config, 1, 37)
    window = Window(ranks, state.model.grouping.lengths)
    good = torch.ones(8, 2, 8, 8), torch.arange(8)
    bad = good[0].clone(), good[1]
    bad[0][5] = float("nan")
    take_step(state, plan, repeat(good), ranks, window)
    window.read(1, 8)
    before = {name: tensor.clone() for name, tensor in state.groups()["model"].items()}
    moments = [tensor.clone() for tensor in state.groups()["optimizer"].values()]
    take_step(state, plan, repeat(bad), ranks, window)
    record, steps = window.read(2, 8)
    assert record["skipped_steps"] == 1
    assert [step.rows for step in steps] == [(5,)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.groups()["model"].items())
    assert all(map(torch.equal, state.groups()["optimizer"].values(), moments))
    take_step(state, plan, repeat(good), ranks, window)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in state.groups()["model"].items())


@pytest.mark.parametrize("name", RECIPES)
def test_cuda_itself_sees_no_wait(name):
    _, step = steps(small_recipe(*RECIPES[name]), CUDA)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_rank_with_nccl(parallel, data, tmp_path):
    alone = train_on_gpu(data, tmp_path / "alone", *PLAIN, "train.precision=fp32")
    recipe = small_recipe(*PLAIN, "train.precision=fp32", f"train.parallel={parallel}")
    given = settings(recipe, data, tmp_path / "nccl").model_copy(update={"device": "cuda"})
    code = "import sys; from xar_cli.train.loop import *; train(TrainSettings.model_validate_json(sys.argv[1]))"
    (tmp_path / "rank.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", str(tmp_path / "rank.py"), given.model_dump_json()]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for step, loss in losses(tmp_path / "nccl").items():
        assert loss == pytest.approx(alone[step], rel=1e-5)


def test_the_batch_is_found_by_a_probe(data, tmp_path):
    train_on_gpu(data, tmp_path / "run", "train.max_batch_per_rank=auto")
    plan = json.loads(RunDir(tmp_path / "run").identity.read_text())["plan"]
    assert plan["batch_size_per_rank"] == 8
