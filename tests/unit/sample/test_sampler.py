"""The sampler: independent of the batch, of tabulation and of compilation; the null branch only where it is needed."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from tests.caches import pixel_recipe
from xar_cli.flow.solvers import SOLVERS
from xar_cli.model import XAR
from xar_cli.model.transformer import init_weights
from xar_cli.precision import autocast
from xar_cli.sample import network
from xar_cli.sample.network import BatchNetwork, PackedLinear, SamplingNetwork, prepare_network
from xar_cli.sample.noise import AddressedNoise
from xar_cli.sample.plan import SamplingPlan
from xar_cli.sample.sampler import sample_latents

CPU = torch.device("cpu")
KINDS = ("{kind: cell, size: 4}", "{kind: subsample, stride: 2}", "{kind: scale, sizes: [2, 8]}", "{kind: image}")


OBLONG_KINDS = (
    "{kind: cell, size: [4, 3]}", "{kind: subsample, stride: 2, order: centre_out}",
    "{kind: scale, sizes: [1, [2, 3], [4, 6]]}", "{kind: token, order: centre_out}",
)  # fmt: skip


def small_model(entity: str = KINDS[0], dim: int = 32, image_size: str = "8") -> XAR:
    network = f"model={{dim: {dim}, depth: 1, heads: 2}}"
    model = XAR(pixel_recipe(network, f"entity={entity}", f"data.image_size={image_size}"))
    init_weights(model, torch.Generator().manual_seed(0))
    return model.eval()


def plan_for(model: XAR, **changes) -> SamplingPlan:
    entities = model.grouping.num_entities
    guidance = tuple(1 + 1.5 * j / max(1, entities - 1) for j in range(entities))
    return dataclasses.replace(SamplingPlan("euler", (3,) * entities, guidance), **changes)


def draw(model: XAR | SamplingNetwork, plan: SamplingPlan, indices=(0, 1, 2), seed: int = 5) -> torch.Tensor:
    labels = torch.tensor([index % 10 for index in indices])
    ready = model if isinstance(model, SamplingNetwork) else SamplingNetwork(model)
    return sample_latents(ready, labels, AddressedNoise(seed, list(indices), 1, CPU), plan)


@torch.inference_mode()
def draw_without_cache(model: XAR, plan: SamplingPlan, indices, seed: int = 5) -> torch.Tensor:
    """The same, written as one uncached pass over the whole sequence at every evaluation."""
    grouping, noise = model.grouping, AddressedNoise(seed, list(indices), 1, CPU)
    labels = torch.tensor([index % 10 for index in indices])
    done = torch.zeros(len(indices), 0, 1)
    for j, length in enumerate(grouping.lengths):
        drawn = noise.draw(j, length, plan.num_steps[j])

        def velocity(x, t, j=j, done=done):
            sequence = torch.cat([done, x.float()], dim=1)
            times = torch.zeros(len(x), j + 1)
            times[:, j] = t
            found = [model(sequence, times, label)[:, -x.shape[1] :] for label in (labels, torch.full_like(labels, 10))]
            return found[1] + plan.guidance[j] * (found[0] - found[1])

        done = torch.cat(
            [done, SOLVERS[plan.solver](velocity, drawn[0], plan.num_steps[j], lambda i, d=drawn: d[i + 1]).float()], 1
        )
    return grouping.to_latents(done)


@pytest.mark.parametrize("entity", KINDS)
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_equal_to_sampling_without_cache_or_tables(entity, solver):
    model = small_model(entity)
    plan = plan_for(model, solver=solver)
    torch.testing.assert_close(draw(model, plan), draw_without_cache(model, plan, (0, 1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entity", OBLONG_KINDS)
def test_so_on_an_oblong_grid(entity):
    model = small_model(entity, image_size="[4, 6]")
    plan = plan_for(model)
    images = draw(model, plan)
    assert images.shape == (3, 1, 4, 6)
    torch.testing.assert_close(images, draw_without_cache(model, plan, (0, 1, 2)), rtol=1e-4, atol=1e-4)


def test_image_i_is_image_i_in_any_batch():
    model = small_model()
    plan = plan_for(model, solver="euler_maruyama")
    together = draw(model, plan, (0, 1, 2, 3, 4))
    for row, index in enumerate((0, 1, 2, 3, 4)):
        torch.testing.assert_close(draw(model, plan, (index,))[0], together[row], rtol=1e-4, atol=1e-4)
    turned = draw(model, plan, (4, 2, 0))
    torch.testing.assert_close(turned, together[[4, 2, 0]], rtol=1e-4, atol=1e-4)


class CountedRows:
    """Counts the rows of every pass through the network."""

    def __init__(self, model: XAR) -> None:
        self.rows: list[int] = []
        enter = model.enter
        model.enter = lambda x, place: self.rows.append(len(x)) or enter(x, place)  # type: ignore[method-assign]


def test_rows_of_every_pass():
    """First entity unguided: B rows; commits and guided entities: 2 B."""
    model = small_model()
    counted = CountedRows(model)
    draw(model, plan_for(model, num_steps=(2, 1, 1, 1)), (0, 1))
    assert counted.rows == [2, 2, 4, 4, 4, 4, 4, 4]


def test_guidance_scale_1_never_runs_a_null_branch():
    model = small_model()
    counted = CountedRows(model)
    draw(model, plan_for(model, guidance=(1.0,) * 4), (0, 1))
    assert set(counted.rows) == {2}


def test_passes_are_those_that_the_plan_counts():
    model = small_model()
    counted = CountedRows(model)
    plan = plan_for(model, interval=(0.2, 0.7), num_steps=(5, 4, 3, 2))
    draw(model, plan, (0,))
    assert sum(counted.rows) == plan.evaluations().total


def test_interval_outside_which_the_result_is_unguided():
    model = small_model()
    unguided = draw(model, plan_for(model, guidance=(1.0,) * 4))
    torch.testing.assert_close(draw(model, plan_for(model, interval=(0.0, 0.01))), unguided)
    assert not torch.allclose(draw(model, plan_for(model)), unguided)


def test_observer_sees_every_evaluation_and_the_results():
    model = small_model()
    seen: list[tuple[int, float]] = []
    result: list[torch.Tensor] = []

    def observe(entity, t, x):
        seen.append((entity, t))
        if t == 0:
            result.append(x)

    plan = plan_for(model, num_steps=(2, 1, 1, 1))
    latents = sample_latents(SamplingNetwork(model), torch.tensor([3]), AddressedNoise(0, [0], 1, CPU), plan, observe)
    assert seen == [(0, 1.0), (0, 0.5), (0, 0.0), (1, 1.0), (1, 0.0), (2, 1.0), (2, 0.0), (3, 1.0), (3, 0.0)]
    assert torch.equal(model.grouping.to_latents(torch.cat(result, 1)), latents)


@torch.inference_mode()
def test_modulation_is_computed_once_for_each_timestep():
    model = small_model()
    network = BatchNetwork(model, torch.tensor([1, 2]), guided=True)
    first = network.modulation(0.5)
    assert network.modulation(0.5) is first
    condition = torch.nn.functional.silu(model.condition(torch.full((4, 1), 0.5), torch.tensor([1, 2, 10, 10])))
    torch.testing.assert_close(first[0], model.encoder[0].modulation(condition))


class Replays:
    """Stands in for CUDA graphs: a recorded call runs again on the same places, and always gives the same tensor."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, run):
        result = torch.full_like(run(), float("nan"))
        self.recorded += 1

        def replay():
            self.replayed += 1
            result.copy_(run())

        return replay, result


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.1, 0.8)])
@pytest.mark.parametrize("entity", KINDS)
def test_recorded_passes_give_the_same_images(entity, interval):
    """Over batches of other labels and noise, without guidance in between, and with a smaller last one."""
    model, record = small_model(entity), Replays()
    plan = plan_for(model, interval=interval)
    unguided = dataclasses.replace(plan, guidance=(1.0,) * len(plan.guidance))
    network = SamplingNetwork(model, lambda: record)
    for indices, how in (((0, 1, 2), unguided), ((0, 1, 2), plan), ((3, 4, 5), plan), ((6, 7, 8), plan), ((9,), plan)):
        assert torch.equal(draw(network, how, indices), draw(model, how, indices))
    assert 0 < record.recorded < 30
    assert record.replayed > 2 * record.recorded


def test_a_pass_is_recorded_at_its_second_use():
    """Three evaluations an entity of 4, a first one without a null branch, and commits: each has its own pass."""
    model, record = small_model(), Replays()
    network, plan = SamplingNetwork(model, lambda: record), plan_for(model, num_steps=(3, 3, 3, 3))
    draw(network, plan)
    assert (record.recorded, record.replayed) == (5, 2 + 2 * 3 + 2 + 3)  # and commits of entities 1, 2; modulation
    draw(network, plan)
    assert record.recorded == 6  # the commit of entity 0


def test_a_larger_batch_is_recorded_anew():
    """With a recorder of its own: the graphs of the one before are gone, and their pool of memory with them."""
    model, made = small_model(), []
    network, plan = SamplingNetwork(model, lambda: made.append(Replays()) or made[-1]), plan_for(model)
    for indices, recorders in (((0, 1), 1), ((2,), 1), ((3, 4), 1), ((0, 1, 2), 2), ((3, 4), 2), ((5, 6, 7), 2)):
        assert torch.equal(draw(network, plan, indices), draw(model, plan, indices))
        assert len(made) == recorders


def test_a_smaller_batch_is_not_compiled_for(monkeypatch):
    torch._dynamo.reset()
    whole, compiled = torch.compile, []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(network.torch, "compile", lambda part, dynamic: whole(part, dynamic=dynamic, backend=backend))
    ready, plan = prepare_network(small_model(), "fp32", compiled=True), plan_for(small_model())
    draw(ready, plan, (0, 1, 2))
    first = len(compiled)
    expected = draw(small_model(), plan, (3, 4))
    torch.testing.assert_close(draw(ready, plan, (3, 4)), expected, rtol=1e-5, atol=1e-5)
    assert len(compiled) == first > 0
    draw(ready, plan, (0, 1, 2, 3))
    assert len(compiled) > first


def test_passes_beyond_a_limit_are_not_recorded(monkeypatch):
    monkeypatch.setattr(network, "MOST_RECORDED", 2)
    model, record = small_model(), Replays()
    ready = SamplingNetwork(model, lambda: record)
    for _ in range(2):
        assert torch.equal(draw(ready, plan_for(model)), draw(model, plan_for(model)))
    assert record.recorded == 2


def test_weights_in_bf16_give_what_autocast_gives():
    """Casting the weights once is what autocast does at every call: the same numbers, bit for bit."""
    plan = plan_for(small_model())
    with autocast("bf16", CPU):
        before = draw(small_model(), plan)
        after = draw(prepare_network(small_model(), "bf16", packed=False), plan)
    assert torch.equal(before, after)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("rows", [1, 64, 512, 600])
def test_a_packed_layer_gives_the_numbers_of_the_layer(rows):
    linear, x = torch.nn.Linear(96, 160), torch.randn(2, rows, 96)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_packed_weights_give_the_same_images(precision, tolerance):
    plan = plan_for(small_model())
    packed = prepare_network(small_model(), precision)
    possible = PackedLinear.possible(packed.model.token_proj.weight)
    products = [
        layer for b in packed.model.blocks for layer in (b.attention.qkv, b.attention.proj, b.mlp.fc1, b.mlp.fc2)
    ]
    assert all(isinstance(layer, PackedLinear) == possible for layer in products)
    with autocast(precision, CPU):
        before = draw(prepare_network(small_model(), precision, packed=False), plan)
        after = draw(packed, plan)
    assert ((after - before).norm() / before.norm()).item() < tolerance


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("entity", "side"), [*((kind, "8") for kind in KINDS), ("{kind: scale, sizes: [1, 2, 4, 8, 16]}", "16")]
)
def test_every_kind_compiles_whole(monkeypatch, entity, side, packed):
    """Lengths, with and without a null branch, make many shapes: none may run into Dynamo's limit and stay eager."""
    torch._dynamo.reset()
    whole = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(network.torch, "compile", lambda part, dynamic: whole(part, dynamic=dynamic))
    model = small_model(entity, image_size=side)
    plan = plan_for(model, interval=(0.1, 0.8))
    expected = draw(model, plan)
    with torch._dynamo.config.patch(cache_size_limit=8):  # as in a new process
        ready = prepare_network(small_model(entity, image_size=side), "fp32", compiled=True, packed=packed)
        found = draw(ready, plan)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", [False, True])  # not packed: as on a GPU
def test_compiled_blocks_give_the_same_images(precision, packed):
    plain = small_model(dim=64)
    compiled = prepare_network(small_model(dim=64), precision, compiled=True, packed=packed)
    plan = plan_for(plain)
    with autocast(precision, CPU):
        expected, found = draw(plain, plan), draw(compiled, plan)
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < (1e-5 if precision == "fp32" else 2e-2)
