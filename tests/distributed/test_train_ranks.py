"""One run is the same run on 1 rank, on 2, with accumulation, sharded; and it goes on exactly where it stopped."""

from __future__ import annotations

import pytest

from tests.caches import make_cache, make_images, make_layout
from tests.distributed.ranks import run_jobs
from tests.runs import damage, final_tensors, losses, settings, small_recipe
from xar_cli.checkpoint import latest_checkpoint
from xar_cli.logs import read_metrics
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
    for name, source in {"unlike": folder / "ddp", "missing": folder / "nowhere"}.items():
        starts = {
            "0": {"init_from": str(folder / "fsdp" / "checkpoints" / "step-00000010" / "ema-0.9.safetensors")},
            "1": {"init_from": str(source)},
        }
        jobs[f"{name} starts"] = job(f"{name} starts", *PLAIN, rank_more=starts, machine_each=True)
    jobs["two then one"] = job("two then one", *PLAIN, fail_at=6)
    jobs["unlike recipes"] = job("unlike", rank_overrides={"1": ["train.base_lr=0.5"]})
    jobs["too few images"] = job("few", "train.global_batch_size=64")
    jobs["no such division"] = job("odd", "train.global_batch_size=7")
    for name in ("ddp", "ddp recomputed"):
        jobs[f"{name} probed"] = job(
            f"{name} probed", *PLAIN, *SPREADS[name], "train.max_batch_per_rank=auto", rank_holds={"0": 4, "1": 2}
        )
    jobs["fsdp probed"] = job(
        "fsdp probed", *PLAIN, "train.parallel=fsdp", "train.max_batch_per_rank=auto",
        rank_holds={"0": 4, "1": 4}, rank_uses={"0": 0.1, "1": 0.21},
    )  # fmt: skip
    other = make_cache(folder / "other.h5", make_layout(source="another"))
    jobs["unlike caches"] = job("unlike caches", rank_data={"1": other})
    jobs["no cache"] = job("no cache", rank_data={"1": folder / "none.h5"})
    looks = ("train.preview_every=5", "train.preview_count=5", "train.eval_every=1", "train.eval_count=7")
    reference = make_images(folder / "real")
    jobs["draws"] = job(
        "draws", *PLAIN, *looks, "train.parallel=fsdp", "evaluate.protocol=digits", more={"reference": reference}
    )
    jobs["draws ddp"] = job("draws ddp", *PLAIN, *looks, "evaluate.protocol=digits", more={"reference": reference})
    train(settings(small_recipe(*PLAIN), data, folder / "origin"))
    jobs["from weights"] = job("from weights", *PLAIN, more={"init_from": str(folder / "origin")})
    for name, steps in {"newest damaged": (8, 10), "all damaged": (4, 8, 10)}.items():
        jobs[name] = job(name, *PLAIN, "train.keep_last=3")
        train(settings(small_recipe(*PLAIN, "train.keep_last=3"), data, folder / name))
        damage(folder / name, *steps)
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
    assert said[name] == ["done", "done"]
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


def test_ranks_with_unlike_caches_are_refused_by_all(said, folder):
    assert said["unlike caches"][0].startswith("Rank 1 has another latent cache than rank 0.")
    assert said["unlike caches"][0] == said["unlike caches"][1]
    assert not (folder / "unlike caches").exists()


def test_a_cache_that_one_rank_does_not_see_is_told_by_all(said, folder):
    assert "none.h5" in said["no cache"][0]
    assert said["no cache"][0] == said["no cache"][1]
    assert not (folder / "no cache").exists()


@pytest.mark.parametrize("name", ["ddp probed", "ddp recomputed probed"])
def test_a_probed_batch_is_what_the_smallest_rank_holds(said, one_rank, folder, name):
    """Rank 1 runs out of memory where rank 0 does not: neither waits for the other, and the run is not disturbed."""
    assert said[name] == ["done", "done"]
    assert latest_checkpoint(RunDir(folder / name)).state["batch_size_per_rank"] == 2
    assert list(losses(folder / name).values()) == pytest.approx(list(one_rank.values()), rel=1e-5)


def test_sharded_ranks_measure_small_batches_together(said, one_rank, folder):
    """By estimate 4 images. On rank 1, 1 and 2 of them take 0.21 and 0.42 of the device: 4 would take 0.84, too much.

    Trying 4 would find 0.42 (`rank_uses`): so the line through the small ones is what decides, and the rank with less.
    """
    assert said["fsdp probed"] == ["done", "done"]
    assert latest_checkpoint(RunDir(folder / "fsdp probed")).state["batch_size_per_rank"] == 2
    assert list(losses(folder / "fsdp probed").values()) == pytest.approx(list(one_rank.values()), rel=1e-5)


def test_bad_input_is_the_same_sentence_on_all_ranks(said, folder):
    assert all("fewer than one global batch" in sentence for sentence in said["too few images"])
    assert all("cannot be divided over 2 ranks" in sentence for sentence in said["no such division"])
    assert not (folder / "few").exists()


@pytest.mark.parametrize(("name", "sentence"), [("unlike", "not the same file on all ranks"), ("missing", "nowhere")])
def test_ranks_start_from_the_same_weights_or_not_at_all(said, folder, name, sentence):
    assert all(sentence in told for told in said[f"{name} starts"])
    assert not (folder / f"{name} starts").exists()


def test_all_ranks_draw_the_preview(said, folder):
    assert said["draws"] == ["done", "done"]
    assert [path.name for path in sorted((folder / "draws" / "previews").iterdir())] == [
        "step-00000005.png",
        "step-00000010.png",
    ]


def test_all_ranks_draw_for_the_evaluation(said, data, folder):
    assert said["draws"] == said["draws ddp"] == ["done", "done"]
    looks = ("train.eval_every=1", "train.eval_count=7", "evaluate.protocol=digits")
    train(settings(small_recipe(*PLAIN, *looks), data, folder / "draws alone", reference=folder / "real"))

    def evaluations(name):
        records = read_metrics(RunDir(folder / name).metrics)
        return {record["step"]: record["evaluation"] for record in records if "evaluation" in record}

    alone = evaluations("draws alone")
    assert sorted(alone) == [5, 10]
    for name in ("draws", "draws ddp"):
        found = evaluations(name)
        assert found.keys() == alone.keys()
        for step, expected in alone.items():
            assert found[step] == pytest.approx(expected, rel=1e-3)


def test_ranks_go_on_together_past_damaged_checkpoints(said, one_rank, folder):
    out = folder / "newest damaged"
    assert said["newest damaged"] == ["done", "done"]
    names = sorted(path.name for path in RunDir(out).checkpoints.iterdir())
    aside = ["damaged-step-00000008", "damaged-step-00000010"]
    assert names == [*aside, "step-00000004", "step-00000008", "step-00000010"]
    assert list(losses(out).values()) == pytest.approx(list(one_rank.values()), rel=1e-5)


def test_without_a_whole_checkpoint_all_ranks_say_so(said, folder):
    assert said["all damaged"][0].startswith("No checkpoint of the run")
    assert said["all damaged"][0] == said["all damaged"][1]
    assert sorted(losses(folder / "all damaged")) == list(range(1, 11))


def test_ranks_start_from_the_same_weights(said, data, folder):
    assert said["from weights"] == ["done", "done"]
    train(settings(small_recipe(*PLAIN), data, folder / "from weights alone", init_from=str(folder / "origin")))
    alone, together = losses(folder / "from weights alone"), losses(folder / "from weights")
    assert list(together.values()) == pytest.approx(list(alone.values()), rel=1e-5)
    assert together[1] != pytest.approx(losses(folder / "origin")[1], rel=1e-3)
