"""Steps whose loss is not finite: skipped, told with their images and timesteps, and too many end the run."""

import json

import numpy as np
import pytest
import torch

from tests.caches import N, make_cache, make_moments
from tests.runs import final_tensors, losses, settings, small_recipe, train_until
from xar_cli.data.latents import LatentWriter
from xar_cli.data.sharding import SampleStream
from xar_cli.errors import UserError
from xar_cli.logs import read_metrics
from xar_cli.model.entities import build_grouping
from xar_cli.run_dir import RunDir
from xar_cli.train import loss_scale
from xar_cli.train.draws import draw_step
from xar_cli.train.loop import train
from xar_cli.train.loss_scale import INITIAL_SCALE


def poisoned_cache(path, rows):
    make_cache(path)
    image, mirror = make_moments()
    image[rows], mirror[rows] = np.nan, np.nan
    with LatentWriter(path) as writer:
        writer.write(np.array(rows), image[rows], mirror[rows])
        writer.commit()
    return path


def told(out):
    return [json.loads(line) for line in (out / "skipped_steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("accumulated", [8, 2])
def test_one_bad_image(tmp_path, accumulated):
    bad = 5
    config = small_recipe(f"train.max_batch_per_rank={accumulated}", "train.log_every=4")
    train(settings(config, poisoned_cache(tmp_path / "latents.h5", [bad]), tmp_path / "run"))
    stream = SampleStream(N, 8, config.train.seed)
    expected = [step for step in range(10) if bad in stream.indices(step)]
    assert [entry["step"] for entry in told(tmp_path / "run")] == [step + 1 for step in expected]
    entry, step = told(tmp_path / "run")[0], expected[0]
    row = stream.indices(step).tolist().index(bad)
    t = draw_step(config, build_grouping(config.entity, config.grid), step, torch.device("cpu")).t[row]
    assert entry["indices"] == [bad]
    assert entry["labels"] == [bad % 10]
    assert entry["not_finite"] == "loss"
    assert entry["timesteps"][0] == pytest.approx(t.tolist(), abs=1e-5)
    assert all(tensor.isfinite().all() for tensor in final_tensors(tmp_path / "run").values())
    records = read_metrics(RunDir(tmp_path / "run").metrics)
    assert sum(record["skipped_steps"] for record in records) == len(expected)
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run").values())


def test_a_skipped_step_changes_no_weight(tmp_path):
    config = small_recipe("train.epochs=0.2", "train.max_bad_steps=5")  # one step
    clean = make_cache(tmp_path / "clean.h5")
    train(settings(config, poisoned_cache(tmp_path / "bad.h5", list(range(N))), tmp_path / "bad"))
    train(settings(config, clean, tmp_path / "clean"))
    from xar_cli.train.state import TrainState

    initial = dict(TrainState.fresh(config, torch.device("cpu")).model.named_parameters())
    skipped, taken = final_tensors(tmp_path / "bad"), final_tensors(tmp_path / "clean")
    name = "velocity_proj.bias"
    assert skipped[f"model/{name}"].equal(initial[name].detach())
    assert skipped[f"optimizer/{name}/exp_avg"].count_nonzero() == 0
    assert skipped[f"optimizer/{name}/step"] == 0
    assert taken[f"optimizer/{name}/step"] == 1


def test_too_many_in_a_row_end_the_run_with_a_checkpoint(tmp_path):
    data = poisoned_cache(tmp_path / "latents.h5", list(range(N)))
    config = small_recipe("train.max_bad_steps=3", "train.log_every=2", "train.checkpoint_every=1000")
    with pytest.raises(UserError, match="not finite for 4 steps in a row, up to step 4") as caught:
        train(settings(config, data, tmp_path / "run"))
    assert caught.value.exit_code == 1
    assert "base_lr" in caught.value.next_step
    assert all(tensor.isfinite().all() for tensor in final_tensors(tmp_path / "run").values())
    changed = small_recipe(
        "train.max_bad_steps=30", "train.log_every=2", "train.checkpoint_every=1000", "train.base_lr=0.001"
    )
    with pytest.raises(UserError, match="--allow-recipe-change"):
        train(settings(changed, data, tmp_path / "run"))
    assert train(settings(changed, data, tmp_path / "run", allow_recipe_change=True))["steps"] == 10


def test_a_resume_tells_no_skipped_step_twice(tmp_path, monkeypatch):
    """All steps are skipped. Killed before step 8, inside a line; the checkpoint of step 4 is gone on from."""
    data, out = poisoned_cache(tmp_path / "latents.h5", list(range(N))), tmp_path / "run"
    config = small_recipe("train.max_bad_steps=30")
    train_until(monkeypatch, 7, config, data, out)
    assert [entry["step"] for entry in told(out)] == list(range(1, 8))
    with (out / "skipped_steps.jsonl").open("a") as file:
        file.write('{"step": 8, "not_f')
    train(settings(config, data, out))
    assert [entry["step"] for entry in told(out)] == list(range(1, 11))


@pytest.mark.parametrize("killed", [5, 7])
def test_a_kill_loses_no_skipped_step_that_the_checkpoint_has_behind_it(tmp_path, monkeypatch, killed):
    """Records every 6 steps, checkpoints every 4: what happened before a checkpoint is recorded with it."""
    data = poisoned_cache(tmp_path / "latents.h5", [5])
    config = small_recipe("train.log_every=6", "train.epochs=3")
    train(settings(config, data, tmp_path / "whole"))
    train_until(monkeypatch, killed, config, data, tmp_path / "cut")
    train(settings(config, data, tmp_path / "cut"))
    whole, cut = told(tmp_path / "whole"), told(tmp_path / "cut")
    assert cut == whole
    records = read_metrics(RunDir(tmp_path / "cut").metrics)
    assert sum(record["skipped_steps"] for record in records) == len(whole) >= 2


def test_fp16_halves_its_scale_after_a_bad_step_and_keeps_it_over_a_resume(tmp_path, monkeypatch):
    """The cut run goes on from step 8, behind steps that were skipped."""
    data, config = poisoned_cache(tmp_path / "latents.h5", [5]), small_recipe("train.precision=fp16")
    train(settings(config, data, tmp_path / "whole"))
    skipped = [entry["step"] for entry in told(tmp_path / "whole")]
    assert min(skipped) <= 8
    whole = final_tensors(tmp_path / "whole")
    assert whole["loss-scale/scale"] == INITIAL_SCALE / 2 ** len(skipped)
    train_until(monkeypatch, 9, config, data, tmp_path / "cut")
    train(settings(config, data, tmp_path / "cut"))
    cut = final_tensors(tmp_path / "cut")
    assert all(cut[name].equal(tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
def test_precisions_agree_roughly(tmp_path, precision, monkeypatch):
    monkeypatch.setattr(loss_scale, "INITIAL_SCALE", 256.0)  # small enough for the first gradients
    data = make_cache(tmp_path / "latents.h5")
    for name in ("fp32", precision):
        train(settings(small_recipe("model.dropout=0", f"train.precision={name}"), data, tmp_path / name))
    ours, exact = losses(tmp_path / precision), losses(tmp_path / "fp32")
    assert list(ours.values()) == pytest.approx(list(exact.values()), rel=0.05)
