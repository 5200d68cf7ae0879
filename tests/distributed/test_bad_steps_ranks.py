"""Steps that are not finite on one rank: skipped by both, counted once; too many of them stop both."""

from __future__ import annotations

import json

import pytest

from tests.caches import N
from tests.distributed.ranks import run_jobs
from tests.runs import final_tensors, small_recipe
from tests.unit.train.test_bad_steps import poisoned_cache
from xar_cli.checkpoint import latest_checkpoint
from xar_cli.data.sharding import SampleStream
from xar_cli.logs import read_metrics
from xar_cli.run_dir import RunDir

STEPS = 10
PARALLEL = ("ddp", "fsdp")
HOPELESS = ("train.log_every=2", "train.checkpoint_every=1000")


def steps_of(image):
    """The steps that draw an image, from 0, and its place in their batches."""
    stream = SampleStream(N, 8, small_recipe().train.seed)
    batches = {step: stream.indices(step).tolist() for step in range(STEPS)}
    return {step: batch.index(image) for step, batch in batches.items() if image in batch}


def image_of_both_ranks():
    """An image that first the one rank draws and later the other, never in the first step."""
    for image in range(N):
        found = steps_of(image)
        if 0 not in found and {row // 4 for row in found.values()} == {0, 1}:
            return image
    raise AssertionError("no such image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad-steps")


@pytest.fixture(scope="module")
def said(folder):
    """All jobs of this file on two ranks."""
    one = poisoned_cache(folder / "one.h5", [image_of_both_ranks()])
    every = poisoned_cache(folder / "every.h5", list(range(N)))
    jobs = {}
    for parallel in PARALLEL:
        spread, hopeless = f"train.parallel={parallel}", folder / f"{parallel} hopeless"
        (folder / f"{parallel} digests").mkdir()
        jobs[parallel] = {
            "data": one, "out": folder / parallel, "overrides": [spread], "digests": folder / f"{parallel} digests",
        }  # fmt: skip
        jobs[f"{parallel} hopeless"] = {
            "data": every, "out": hopeless, "overrides": [*HOPELESS, spread, "train.max_bad_steps=3"],
        }  # fmt: skip
        jobs[f"{parallel} resumed"] = {
            "data": every, "out": hopeless, "overrides": [*HOPELESS, spread, "train.max_bad_steps=30"],
            "more": {"allow_recipe_change": True},
        }  # fmt: skip
    return run_jobs(jobs, folder, timeout=240)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_bad_image_of_one_rank_is_skipped_by_both(said, folder, parallel):
    assert said[parallel] == ["done", "done"]
    bad = steps_of(image_of_both_ranks())
    of_rank = [(folder / f"{parallel} digests" / f"rank-{rank}").read_text().split() for rank in range(2)]
    for digests in of_rank:
        assert len(digests) == STEPS
        unchanged = [step for step in range(1, STEPS) if digests[step] == digests[step - 1]]
        assert unchanged == sorted(bad)
    if parallel == "ddp":  # with FSDP, ranks hold different shards
        assert of_rank[0] == of_rank[1]
    assert all(tensor.isfinite().all() for tensor in final_tensors(folder / parallel).values())


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_skipped_step_is_counted_and_told_once(said, folder, parallel):
    assert said[parallel] == ["done", "done"]
    image = image_of_both_ranks()
    bad = [step + 1 for step in steps_of(image)]
    records = read_metrics(RunDir(folder / parallel).metrics)
    assert {record["step"]: record["skipped_steps"] for record in records} == {
        step: int(step in bad) for step in range(1, STEPS + 1)
    }
    told = [json.loads(line) for line in (folder / parallel / "skipped_steps.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["indices"], entry["not_finite"]) for entry in told] == [
        (step, [image], "loss") for step in bad
    ]


@pytest.mark.parametrize("parallel", PARALLEL)
def test_too_many_stop_both_ranks_with_a_checkpoint_to_go_on_from(said, folder, parallel):
    first, second = said[f"{parallel} hopeless"]
    assert "not finite for 4 steps in a row, up to step 4; a checkpoint from before them is written." in first
    assert first == second
    assert said[f"{parallel} resumed"] == ["done", "done"]
    out = folder / f"{parallel} hopeless"
    told = [json.loads(line)["step"] for line in (out / "skipped_steps.jsonl").read_text().splitlines()]
    assert told == list(range(1, STEPS + 1))  # the resumed run began where the other had stopped
    assert latest_checkpoint(RunDir(out)).step == STEPS
