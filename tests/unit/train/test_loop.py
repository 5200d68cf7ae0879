"""One process: the run goes on bit for bit, and bad input is a sentence."""

import errno
import json

import pytest
import torch

from tests import caches
from tests.caches import make_cache
from tests.runs import damage, final_tensors, losses, settings, small_recipe, train_until
from xar_cli.errors import UserError
from xar_cli.hub import sha256_of
from xar_cli.logs import log
from xar_cli.train.loop import dry_run_plan, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "latents.h5")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of 10 steps without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(settings(small_recipe(), data, out))
    return out


@pytest.mark.parametrize("stop_at", [3, 5, 9])  # before the first checkpoint, in the second epoch, after the second
def test_resume_is_bit_for_bit(whole, data, tmp_path, monkeypatch, stop_at):
    out = tmp_path / "run"
    train_until(monkeypatch, stop_at, small_recipe(), data, out)
    train(settings(small_recipe(), data, out))
    expected, found = final_tensors(whole), final_tensors(out)
    assert expected.keys() == found.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert losses(out) == losses(whole)
    assert sorted(losses(out)) == list(range(1, 11))


@pytest.mark.parametrize("keep_last", [1, 2])
def test_training_goes_on_past_damaged_checkpoints(whole, data, tmp_path, keep_last):
    """Steps 8 and 10 are damaged: the run goes on from 4, and its new checkpoints stay."""
    out = tmp_path / "run"
    train(settings(small_recipe("train.keep_last=3"), data, out))
    damage(out, 8, 10)
    train(settings(small_recipe(f"train.keep_last={keep_last}"), data, out, allow_recipe_change=True))
    names = sorted(folder.name for folder in (out / "checkpoints").iterdir())
    kept = ["step-00000008", "step-00000010"][-keep_last:]
    assert names == ["damaged-step-00000008", "damaged-step-00000010", *kept]
    expected, found = final_tensors(whole), final_tensors(out)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert losses(out) == losses(whole)


def files(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(data, tmp_path):
    out = tmp_path / "run"
    train(settings(small_recipe(), data, out))
    damage(out, 8, 10)
    before = files(out)
    with pytest.raises(UserError, match=r"No checkpoint of the run .* is whole"):
        train(settings(small_recipe(), data, out))
    assert files(out) == before


def first_loss(out):
    return losses(out)[1]


def test_what_a_run_was_started_from_stays(whole, data, tmp_path, monkeypatch):
    """Killed before the first checkpoint, the command must say it again; afterwards it need not."""
    out, config, other = tmp_path / "run", small_recipe("train.base_lr=0.01"), tmp_path / "other"
    train_until(monkeypatch, 2, config, data, out, init_from=str(whole))
    began = first_loss(out)
    with pytest.raises(UserError, match=r"was started from '.*' and has no checkpoint yet"):
        train(settings(config, data, out))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        dry_run_plan(config, data, out, 1, device="cpu")
    train_until(monkeypatch, 6, config, data, out, init_from=str(whole))
    assert first_loss(out) == began != first_loss(whole)
    recorded = json.loads((out / "run.json").read_text())["init_from"]
    file = whole / "checkpoints" / "step-00000010" / "ema-0.9.safetensors"
    assert recorded == {"source": str(whole), "file": str(file), "sha256": sha256_of(file)}
    with pytest.raises(UserError, match=r"was started from '.*', not from '.*other'"):
        train(settings(config, data, out, init_from=str(other)))
    monkeypatch.chdir(whole.parent)
    train_until(monkeypatch, 7, config, data, out, init_from=whole.name)
    train(settings(config, data, out))
    assert sorted(losses(out)) == list(range(1, 11))
    assert first_loss(out) == began
    assert json.loads((out / "run.json").read_text())["init_from"] == recorded


@pytest.mark.parametrize("stop_at", [2, 6])  # before the first checkpoint and after
def test_a_run_from_nothing_takes_no_weights_later(whole, data, tmp_path, monkeypatch, stop_at):
    train_until(monkeypatch, stop_at, small_recipe(), data, tmp_path / "run")
    with pytest.raises(UserError, match="was started without --init-from"):
        train(settings(small_recipe(), data, tmp_path / "run", init_from=str(whole)))


def test_a_run_of_an_older_version_goes_on_with_the_same_command(whole, data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    identity = tmp_path / "run" / "run.json"
    train_until(monkeypatch, 6, small_recipe(), data, tmp_path / "run", init_from=str(whole))
    content = json.loads(identity.read_text())
    del content["init_from"]
    identity.write_text(json.dumps(content))
    train(settings(small_recipe(), data, tmp_path / "run", init_from=str(whole)))
    assert "--init-from has no effect" in caplog.text


def test_dropout_is_on(whole, data, tmp_path):
    train(settings(small_recipe("model.dropout=0"), data, tmp_path / "run"))
    assert losses(tmp_path / "run")[1] != losses(whole)[1]


def test_accumulation_does_not_change_the_losses(data, tmp_path):
    for at_most in (8, 2):
        config = small_recipe("model.dropout=0", f"train.max_batch_per_rank={at_most}")
        train(settings(config, data, tmp_path / str(at_most)))
    ours, theirs = losses(tmp_path / "8"), losses(tmp_path / "2")
    assert [theirs[step] for step in ours] == pytest.approx(list(ours.values()), rel=1e-5)


def test_a_finished_run_stays_as_it_is(whole, data):
    before, identity = final_tensors(whole), (whole / "run.json").read_text()
    assert json.loads(identity)["plan"]["device_bytes"] > 0
    result = train(settings(small_recipe(), data, whole))
    assert result["steps"] == 10
    assert all(tensor.equal(before[name]) for name, tensor in final_tensors(whole).items())
    assert (whole / "run.json").read_text() == identity


def test_a_finished_run_is_not_taken_for_one_of_another_cache(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "LABELS", caches.LABELS[::-1].copy())
    with pytest.raises(UserError, match="made with another latent cache"):
        train(settings(small_recipe(), make_cache(tmp_path / "other.h5"), whole))


def test_a_missing_cache_writes_nothing(tmp_path):
    with pytest.raises(UserError):
        train(settings(small_recipe(), tmp_path / "none.h5", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_too_small_a_cache_writes_nothing(data, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in ("runs/new/run", "empty"):
        with pytest.raises(UserError, match="fewer than one global batch"):
            train(settings(small_recipe("train.global_batch_size=64"), data, tmp_path / out))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("out", ["photos", "photos/cat.png"])
def test_a_place_of_something_else_is_left_alone(data, tmp_path, out):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(UserError, match="is not empty and is not a run folder"):
        train(settings(small_recipe(), data, tmp_path / out))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_a_folder_that_cannot_be_written_to(data, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("xar_cli.train.run.JobLock", refuse)
    with pytest.raises(UserError, match="cannot be written to: Permission denied"):
        train(settings(small_recipe(), data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_another_grid_writes_nothing(data, tmp_path):
    with pytest.raises(UserError, match="image size"):
        train(settings(small_recipe("data.image_size=16"), data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_random_state_outside_does_not_matter(whole, data, tmp_path):
    torch.manual_seed(999)
    train(settings(small_recipe(), data, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(whole)
