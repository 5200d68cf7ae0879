"""Before the first step: the plan against the memory that is here, on the command line and in a run."""

import json
import logging

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.caches import N, make_cache
from tests.runs import settings, small_recipe
from xar_cli.cli.app import app
from xar_cli.config import dump_config, load_recipe
from xar_cli.data.latents import LatentReader, LatentWriter
from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.logs import log
from xar_cli.train import loop, preflight
from xar_cli.train import step as step_module
from xar_cli.train.loop import train
from xar_cli.train.state import TrainState

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path):
    return make_cache(tmp_path / "latents.h5")


@pytest.fixture
def caplog(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="xar")
    return caplog


def dry_run(tmp_path, *options):
    (tmp_path / "small.yaml").write_text(dump_config(small_recipe()))
    result = CliRunner().invoke(
        app,
        ["train", "--recipe", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "run"), "--dry-run", *options],
    )
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run").exists()
    return result.stdout


def test_dry_run_compares_with_the_device(data, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "device_bytes", lambda device: 6000)
    found = json.loads(dry_run(tmp_path, "--data", str(data), "--device", "cpu", "--nproc-per-node", "2", "--json"))
    assert (found["device_bytes"], found["fits"]) == (3000, False)  # two ranks share it
    shown = " ".join(dry_run(tmp_path, "--data", str(data), "--device", "cpu").split())
    assert "will probably not fit" in shown
    monkeypatch.setattr(preflight, "device_bytes", lambda device: 10**12)
    assert json.loads(dry_run(tmp_path, "--data", str(data), "--device", "cpu", "--json"))["fits"] is True


@pytest.mark.parametrize("rank", [0, 1])
def test_dry_run_in_a_job_plans_for_its_ranks_and_is_printed_once(tmp_path, monkeypatch, rank):
    job = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**job, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    printed = dry_run(tmp_path, "--json")
    assert printed == "" if rank else json.loads(printed)["world_size"] == 4


def test_dry_run_without_data_knows_no_device(tmp_path):
    found = json.loads(dry_run(tmp_path, "--json"))
    assert found["memory_bytes"] > 0
    assert found["device_bytes"] is found["fits"] is None


def test_dry_run_estimates_the_batch_where_it_is_auto(data, tmp_path, monkeypatch):
    command = ("--data", str(data), "--device", "cpu", "--max-batch-per-rank", "auto", "--json")
    assert json.loads(dry_run(tmp_path, *command))["batch_size_per_rank"] == 8
    monkeypatch.setattr(preflight, "device_bytes", lambda device: 1)
    assert json.loads(dry_run(tmp_path, *command))["batch_size_per_rank"] == 1


def test_a_run_warns_before_its_first_step(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(preflight, "device_bytes", lambda device: 3000)
    train(settings(small_recipe("train.epochs=0.2"), data, tmp_path / "run"))
    assert caplog.text.count("will probably not fit") == 1
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    assert plan["fits"] is False


def test_a_cpu_is_not_probed_and_that_is_said(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "probed_batch", None)
    train(settings(small_recipe("train.epochs=0.2", "train.max_batch_per_rank=auto"), data, tmp_path / "run"))
    assert "by estimate (the memory of a CPU is not probed)" in caplog.text


@pytest.mark.parametrize(("local", "expected"), [("4", 25), (None, 10)])
def test_ranks_of_one_machine_share_its_memory(monkeypatch, local, expected):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(preflight, "device_bytes", lambda device: 100)
    plan = loop.make_plan(load_recipe("tiny"), 1, 1500)
    assert preflight.with_memory(plan, Ranks(1, 1, 10, CPU)).device_bytes == expected


OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_first_batch_that_does_not_fit_ends_the_run_before_anything_is_written(data, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(step_module, "batch_loss", full)
    with pytest.raises(UserError, match="pass of 8 images does not fit") as caught:
        train(settings(small_recipe(), data, tmp_path / "run"))
    assert caught.value.exit_code == 1
    assert "--max-batch-per-rank 4" in caught.value.next_step
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_batch_that_auto_chose_and_does_not_fit_is_told_with_a_smaller_one(data, monkeypatch, caplog, parallel):
    """Ranks meet inside the pass: the one that fails says so before it waits for the others."""

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(preflight, "some_passes", full)
    config, ranks = small_recipe("train.max_batch_per_rank=auto", f"train.parallel={parallel}"), Ranks(1, 1, 2, CPU)
    state, plan = TrainState.fresh(config, CPU), loop.make_plan(config, 2, N)
    with pytest.raises(UserError, match="pass of 4 images, which auto chose, does not fit") as caught:
        preflight.first_batch(state, plan, iter(()), ranks)
    assert caught.value.next_step.startswith("Try --max-batch-per-rank 2, ")
    assert "which auto chose" in caplog.text
    assert "--max-batch-per-rank 2" in caplog.text


def test_the_first_batch_leaves_room_for_the_optimizer(data, tmp_path, monkeypatch):
    """What AdamW keeps is not there yet, and will be from the first step on."""
    held, made = [], torch.empty

    def empty(*shape, **options):
        if options.get("dtype") == torch.uint8:
            held.append(shape[0])
        return made(*shape, **options)

    monkeypatch.setattr(preflight.torch, "empty", empty)
    config = small_recipe()
    state, plan = TrainState.fresh(config, CPU), loop.make_plan(config, 1, N)
    with LatentReader(data) as reader:
        ranks = Ranks(0, 0, 1, CPU)
        preflight.first_batch(state, plan, loop.batches_from(config, plan, reader, ranks, 0), ranks)
    assert held == [2 * 4 * sum(parameter.numel() for parameter in state.model.parameters())]


@pytest.mark.parametrize(("parallel", "world_size", "share"), [("ddp", 2, 0.9), ("fsdp", 1, 0.9), ("fsdp", 2, 0.8)])
def test_a_batch_that_is_not_tried_leaves_more_room(monkeypatch, parallel, world_size, share):
    budgets = []
    monkeypatch.setattr(preflight, "device_bytes", lambda device: 1000)
    monkeypatch.setattr(preflight, "find_batch", lambda *arguments: budgets.append(arguments[-1]) or 4)
    state = TrainState.fresh(small_recipe(f"train.parallel={parallel}"), CPU)
    assert preflight.probed_batch(state, Ranks(0, 0, world_size, CPU), 8, lambda batch: None) == 4
    assert budgets == [share * 1000]


def test_another_error_of_the_first_batch_keeps_its_words(data, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(step_module, "batch_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(settings(small_recipe(), data, tmp_path / "run"))


def test_a_first_batch_that_is_not_finite_is_told(tmp_path, caplog):
    make_cache(tmp_path / "bad.h5")
    image, mirror = np.full((2, N, 2, 8, 8), np.nan, dtype=np.float32)
    with LatentWriter(tmp_path / "bad.h5") as writer:
        writer.write(np.arange(N), image, mirror)
        writer.commit()
    train(settings(small_recipe("train.epochs=0.2"), tmp_path / "bad.h5", tmp_path / "run"))
    assert "The loss of the first batch is not finite" in caplog.text


def test_gradients_of_the_first_batch_have_their_place_in_the_second_pass(data, tmp_path, monkeypatch):
    """With accumulation the second pass needs more memory than the first: both are tried."""
    passes, batch_loss = [], step_module.batch_loss

    def counted(model, *rest):
        passes.append(any(parameter.grad is not None for parameter in model.parameters()))
        return batch_loss(model, *rest)

    monkeypatch.setattr(step_module, "batch_loss", counted)
    monkeypatch.setattr(loop, "_run_steps", lambda *_: {})
    for at_most in (2, 8):
        train(settings(small_recipe(f"train.max_batch_per_rank={at_most}"), data, tmp_path / str(at_most)))
    assert passes == [False, True, False]
