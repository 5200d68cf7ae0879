"""One run is the same run on 1 rank, on 2, with accumulation, sharded; and it goes on exactly where it stopped."""

from __future__ import annotations

import pytest

from tests.caches import make_cache
from tests.distributed.ranks import run_jobs
from tests.runs import final_tensors, losses, settings, small_recipe
from xar_cli.checkpoint import latest_checkpoint
from xar_cli.run_dir import RunDir
from xar_cli.train.loop import train

PLAIN = ("model.dropout=0",)
SPREADS = {
    "ddp": (),
    "ddp accumulated": ("train.max_batch_per_rank=1",),
    "fsdp": ("train.parallel=fsdp",),
    "fsdp accumulated": ("train.parallel=fsdp", "train.max_batch_per_rank=2"),
    "fsdp recomputed": ("train.parallel=fsdp", "train.activation_checkpointing=true"),
    "ddp recomputed": ("train.activation_checkpointing=true",),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "latents.h5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def said(data, folder):
    """All jobs of this file on two ranks."""

    def job(name, *overrides, out=None, **more):
        return {"data": data, "out": folder / (out or name), "overrides": overrides, **more}

    jobs = {name: job(name, *PLAIN, *overrides) for name, overrides in SPREADS.items()}
    for parallel in ("ddp", "fsdp"):
        spread = f"train.parallel={parallel}"
        jobs |= {
            f"{parallel} whole": job(f"{parallel} whole", spread),
            f"{parallel} cut": job("", spread, out=f"{parallel} cut", fail_at=6),
            f"{parallel} resumed": job("", spread, out=f"{parallel} cut"),
        }
    jobs["two then one"] = job("two then one", *PLAIN, fail_at=6)
    jobs["unlike recipes"] = job("unlike", rank_overrides={"1": ["train.base_lr=0.5"]})
    jobs["too few images"] = job("few", "train.global_batch_size=64")
    jobs["no such division"] = job("odd", "train.global_batch_size=7")
    jobs["draws"] = job("draws", "train.preview_every=5", "train.preview_count=5", "train.parallel=fsdp")
    return run_jobs(jobs, folder)


@pytest.fixture(scope="module")
def one_rank(data, folder):
    train(settings(small_recipe(*PLAIN), data, folder / "one rank"))
    return losses(folder / "one rank")


@pytest.mark.parametrize("name", SPREADS)
def test_equal_losses(said, one_rank, folder, name):
    assert said[name] == ["done", "done"]
    found = losses(folder / name)
    assert sorted(found) == list(range(1, 11))
    assert [found[step] for step in one_rank] == pytest.approx(list(one_rank.values()), rel=1e-5)


@pytest.mark.parametrize("name", SPREADS)
def test_equal_weights(said, one_rank, folder, name):
    """Checkpoints hold whole tensors, however the run was spread."""
    expected, found = final_tensors(folder / "one rank"), final_tensors(folder / name)
    assert expected.keys() == found.keys()
    for key in ("model/pos_encoder", "ema-0.9/encoder.0.mlp.fc1.weight", "ema-0.5/decoder_norm.weight"):
        assert (found[key] - expected[key]).norm() <= 1e-3 * expected[key].norm()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resume_is_bit_for_bit(said, folder, parallel):
    assert said[f"{parallel} cut"] == ["Failed as asked. "] * 2
    assert said[f"{parallel} resumed"] == ["done", "done"]
    expected, found = final_tensors(folder / f"{parallel} whole"), final_tensors(folder / f"{parallel} cut")
    assert expected.keys() == found.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert losses(folder / f"{parallel} cut") == losses(folder / f"{parallel} whole")


def test_another_number_of_ranks_goes_on_with_the_same_data(said, one_rank, data, folder):
    out = folder / "two then one"
    assert said["two then one"] == ["Failed as asked. "] * 2
    assert latest_checkpoint(RunDir(out)).state["world_size"] == 2
    train(settings(small_recipe(*PLAIN), data, out))
    assert list(losses(out).values()) == pytest.approx(list(one_rank.values()), rel=1e-5)


def test_ranks_with_unlike_recipes_are_refused_by_all(said, folder):
    assert said["unlike recipes"][0].startswith("Rank 1 has another recipe than rank 0.")
    assert said["unlike recipes"][0] == said["unlike recipes"][1]
    assert not (folder / "unlike").exists()


def test_bad_input_is_the_same_sentence_on_all_ranks(said, folder):
    assert all("fewer than one global batch" in sentence for sentence in said["too few images"])
    assert all("cannot be divided over 2 ranks" in sentence for sentence in said["no such division"])
    assert not (folder / "few").exists()


def test_all_ranks_draw_the_preview(said, folder):
    assert said["draws"] == ["done", "done"]
    assert [path.name for path in sorted((folder / "draws" / "previews").iterdir())] == [
        "step-00000005.png",
        "step-00000010.png",
    ]
