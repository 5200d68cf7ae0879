from dataclasses import replace

import pytest

from tests.runs import small_recipe
from xar_cli.config import load_recipe
from xar_cli.errors import UserError
from xar_cli.run_dir import format_bytes
from xar_cli.train.plan import accumulation_steps, describe_plan, make_plan, memory_warning

IMAGENET = 1_281_167


@pytest.mark.parametrize(
    ("world", "at_most", "accumulation"), [(1, 64, 32), (8, 64, 4), (64, 64, 1), (8, 256, 1), (8, 100, 4), (2, 1, 1024)]
)
def test_accumulation(world, at_most, accumulation):
    assert accumulation_steps(2048, world, at_most) == accumulation


def test_impossible_division_names_the_possible_ones():
    with pytest.raises(UserError) as caught:
        accumulation_steps(2048, 24, 64)
    assert caught.value.message == "A global batch of 2048 cannot be divided over 24 ranks."
    assert "8, 16, 32, 64" in caught.value.next_step or "16, 32" in caught.value.next_step


@pytest.mark.parametrize(("name", "parameters"), [("base", 172.6), ("large", 608.4), ("huge", 1186.0)])
def test_published_runs(name, parameters):
    plan = make_plan(load_recipe(name), 64, IMAGENET)
    assert round(plan.parameters / 1e6, 1) == parameters
    assert plan.total_steps == 500456  # 800 epochs of 625.57 steps
    assert plan.warmup_steps == 62557
    assert plan.decay_start_step == 375342
    assert plan.peak_lr == pytest.approx(4e-4)
    assert plan.batch_size_per_rank * plan.accumulation_steps * plan.world_size == 2048
    # weights, both moments and one average, 4 bytes each; the padding of the MLP is little
    assert plan.checkpoint_bytes == pytest.approx(16 * plan.parameters, rel=0.02)


def test_memory_grows_with_batch_and_averages():
    base = make_plan(load_recipe("base"), 8, IMAGENET).memory_bytes
    assert make_plan(load_recipe("base", ["train.max_batch_per_rank=32"]), 8, IMAGENET).memory_bytes < base
    two = make_plan(load_recipe("base", ["train.ema_decays=[0.9999, 0.9996]"]), 8, IMAGENET).memory_bytes
    assert two - base == pytest.approx(4 * 172.6e6, rel=0.02)


def test_cache_smaller_than_a_batch():
    with pytest.raises(UserError, match="holds 5 images, fewer than one global batch of 8"):
        make_plan(small_recipe(), 1, 5)


def test_description_says_how_the_batch_is_made_up(tmp_path):
    config = load_recipe("huge")
    rows = dict(describe_plan(config, make_plan(config, 8, IMAGENET), tmp_path))
    assert rows["global batch"].startswith("2048 = 8 ranks x 16 accumulation x 16 images")
    assert "1.24" in rows["expected result"]
    assert rows["parameters"] == "1186.0 M (published: 1186 M)"
    assert rows["entities"] == "4 cells of 8 x 8 tokens, in raster order, on a grid of 16 x 16"
    assert rows["context"] == "noisy, random timesteps"
    assert rows["work"].startswith("1,245 GFLOP per image, ")
    tiny = load_recipe("tiny")
    assert dict(describe_plan(tiny, make_plan(tiny, 1, 1500), tmp_path))["work"].startswith("0.088 GFLOP per image, ")
    assert str(tmp_path) in rows["written to"]


@pytest.mark.parametrize(
    ("entity", "text"),
    [
        ("{kind: token, order: centre_out}", "256 tokens, from the centre outwards"),
        ("{kind: image}", "the whole image"),
        ("{kind: cell, size: [8, 16], order: [1, 0]}", "2 cells of 8 x 16 tokens, in the order 1 0"),
        ("{kind: subsample, stride: 2}", "4 subsamples at a stride of 2 x 2 tokens, in raster order"),
        ("{kind: scale, sizes: [1, [2, 4], 16]}", "3 scales of 1, 2 x 4, 16 tokens a side (area)"),
    ],
)
def test_the_plan_says_what_x_is_and_expects_nothing_of_another_x(tmp_path, entity, text):
    config = load_recipe("base", [f"entity={entity}", "train.context=clean"])
    rows = dict(describe_plan(config, make_plan(config, 8, IMAGENET), tmp_path))
    assert rows["entities"] == f"{text}, on a grid of 16 x 16"
    assert rows["context"] == "clean"
    assert "expected result" not in rows


def plan_for(memory, *overrides):
    config = load_recipe("huge", overrides)
    return config, replace(make_plan(config, 8, IMAGENET), device_bytes=memory)


def test_a_batch_beyond_the_devices_memory_is_told_with_what_to_do(tmp_path):
    """xAR-H with 128 images a pass."""
    config, plan = plan_for(80 * 10**9, "train.max_batch_per_rank=128")
    rows = dict(describe_plan(config, plan, tmp_path))
    assert plan.as_dict()["fits"] is False
    assert rows["warning"].startswith("The batch will probably not fit: about ")
    for word in ("80.0 GB are there", "--max-batch-per-rank", "activation_checkpointing", "fsdp"):
        assert word in rows["warning"]
    for larger in (plan.memory_bytes, 2 * plan.memory_bytes):
        config, plan = plan_for(larger, "train.max_batch_per_rank=128")
        rows = dict(describe_plan(config, plan, tmp_path))
        assert plan.fits
        assert "warning" not in rows
        assert rows["memory per rank"].endswith(f"of {format_bytes(larger)}")


def test_a_plan_of_another_machine_is_the_estimate_alone(tmp_path):
    config, plan = plan_for(None)
    assert plan.as_dict()["device_bytes"] is plan.as_dict()["fits"] is None
    rows = dict(describe_plan(config, plan, tmp_path))
    assert rows["memory per rank"].endswith("(estimate)")
    assert "warning" not in rows


def test_a_smaller_batch_is_not_advised_where_there_is_none():
    warning = memory_warning(plan_for(1, "train.max_batch_per_rank=1")[1])
    assert warning is not None
    assert "--max-batch-per-rank" not in warning
