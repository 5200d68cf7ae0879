"""What the sampler will do for one image, and what that costs."""

from __future__ import annotations

import pytest

from tests.caches import pixel_recipe
from xar_cli.config import load_recipe
from xar_cli.errors import UserError
from xar_cli.sample.plan import Evaluations, SamplingPlan, evaluation_times, flops_per_image


def plan_of(*overrides: str) -> SamplingPlan:
    return SamplingPlan.of(load_recipe("base", [f"sample.{override}" for override in overrides]))


def test_published_plan():
    plan = plan_of()
    assert (plan.solver, plan.num_steps) == ("euler_maruyama", (40, 40, 40, 40))
    assert plan.guidance == pytest.approx((1, 1 + 1.7 / 3, 1 + 3.4 / 3, 2.7))
    assert plan.evaluations() == Evaluations(conditional=160, null=120, commits=6)


def test_guidance_scale_1_runs_no_null_branch():
    plan = plan_of("guidance_scale=1", "guidance_schedule=constant")
    assert not plan.guided
    assert plan.evaluations() == Evaluations(conditional=160, null=0, commits=3)


def test_step_annealing():
    assert plan_of("num_steps='40:15'").num_steps == (40, 32, 23, 15)
    assert plan_of("num_steps='40:15'", "guidance_scale=1").evaluations().total == 110 + 3


def test_guidance_interval_leaves_null_passes_out():
    plan = plan_of("solver=euler", "num_steps=10", "guidance_interval=[0.1, 0.8]", "guidance_schedule=constant")
    assert plan.scale(3, 0.9) == 1
    assert plan.scale(3, 0.5) == 2.7
    assert plan.evaluations().null == 4 * 8  # t = 0.8 .. 0.1 of 1.0, 0.9, .. 0.1


def test_evaluation_times():
    assert evaluation_times("euler", 4) == (1, 0.75, 0.5, 0.25)
    assert evaluation_times("heun", 4) == (1, 0.5, 0.5, 0)


@pytest.mark.parametrize(("name", "teraflop"), [("base", 4.32), ("large", 18.89), ("huge", 36.68)])
def test_necessary_work_of_the_published_settings(name, teraflop):
    """Counted by hand for the three networks; modulation, once a batch here, is the difference."""
    config = load_recipe(name)
    assert flops_per_image(config, SamplingPlan.of(config)) / 1e12 == pytest.approx(teraflop, rel=0.02)


@pytest.mark.parametrize("schedule", ["40:15", "10:5", "12:4", "'12:4'"])
def test_a_schedule_needs_no_quotes(schedule, tmp_path):
    """YAML 1.1 reads a bare 12:4 as 724, a number to the base 60."""
    first, last = map(int, schedule.strip("'").split(":"))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: base\nsample:\n  num_steps: {schedule}\n")
    for config in (load_recipe("base", [f"sample.num_steps={schedule}"]), load_recipe(str(recipe))):
        steps = SamplingPlan.of(config).num_steps
        assert (steps[0], steps[-1]) == (first, last)


@pytest.mark.parametrize(("written", "meant"), [("40:40", "40"), ("010:05", "10:5")])
def test_one_schedule_is_one_recipe_however_it_is_written(written, meant):
    assert plan_of(f"num_steps='{written}'") == plan_of(f"num_steps='{meant}'")
    configs = [load_recipe("base", [f"sample.num_steps='{text}'"]) for text in (written, meant)]
    assert configs[0] == configs[1]


def test_without_classes_no_null_branch_runs():
    """Both branches would have the null label."""
    plan = SamplingPlan.of(load_recipe("base", ["data.num_classes=0"]))
    assert not plan.guided
    assert plan.evaluations().null == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("num_steps=2000:15", "1 to 1000"),
        ("num_steps='40:0'", "1 to 1000"),
        ("num_steps='40:1'", "2 or more"),
        ("num_steps='1:2:3'", "num_steps"),
        ("guidance_interval=[0.8, 0.1]", "rising"),
        ("guidance_schedule=steep", "guidance_schedule"),
        ("guidance_scale=-1", "guidance_scale"),
        ("guidance_scale=.inf", "guidance_scale"),
        ("guidance_interval=[.nan, 1]", "guidance_interval"),
    ],
)
def test_settings_that_make_no_sense(override, words):
    with pytest.raises(UserError, match=words):
        plan_of(override)


def test_one_entity_takes_the_first_number_of_steps_and_the_whole_guidance():
    plan = SamplingPlan.of(pixel_recipe("entity={kind: image}", "sample.num_steps='9:3'", "sample.guidance_scale=2"))
    assert (plan.num_steps, plan.guidance) == ((9,), (2.0,))
