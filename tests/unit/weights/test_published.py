"""The published names and ours, both ways: exact values, exact names, exact shapes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.seeded import GOLDEN, seeded_state
from xar_cli.config import load_recipe
from xar_cli.errors import UserError
from xar_cli.model import XAR, build_grouping
from xar_cli.weights.published import (
    derived_buffers,
    from_published,
    is_derived,
    our_shapes,
    published_shapes,
    to_published,
)

BASE = [(name, tuple(shape)) for name, shape in json.loads((GOLDEN / "xar_base_state_shapes.json").read_text())]


def test_base_has_the_published_names_and_shapes_in_their_order():
    config = load_recipe("base")
    parameters = [(name, shape) for name, shape in BASE if not is_derived(name)]
    assert list(published_shapes(config).items()) == parameters


def test_what_we_write_has_every_name_and_shape_of_the_published_file_buffers_included():
    config = load_recipe("base")
    hollow = {name: torch.empty(shape, device="meta") for name, shape in our_shapes(config).items()}
    written = to_published(hollow, config)
    assert [(name, tuple(tensor.shape)) for name, tensor in written.items()] == BASE


@pytest.mark.parametrize("name", ["base", "large", "huge"])
def test_every_parameter_of_ours_has_its_published_parts_and_nothing_else(name):
    config = load_recipe(name)
    hollow = {key: torch.empty(shape, device="meta") for key, shape in published_shapes(config).items()}
    ours = {key: tuple(tensor.shape) for key, tensor in from_published(hollow, config).items()}
    assert ours == dict(our_shapes(config))


def test_there_and_back_is_exact_and_the_padding_is_zero(golden_config, published):
    hidden = golden_config.model.mlp_hidden  # 85, padded to 128
    ours = from_published(published, golden_config)
    assert ours["encoder.1.mlp.fc1.weight"].shape == (256, 32)
    assert torch.equal(ours["encoder.1.mlp.fc1.weight"][:hidden], published["encoder_blocks.1.mlp.fc1_g.weight"])
    assert torch.equal(ours["encoder.1.mlp.fc1.bias"][128 : 128 + hidden], published["encoder_blocks.1.mlp.fc1_x.bias"])
    assert torch.equal(ours["decoder.0.mlp.fc2.weight"][:, :hidden], published["decoder_blocks.0.mlp.fc2.weight"])
    for block in ("encoder.0", "decoder.1"):
        assert not ours[f"{block}.mlp.fc1.weight"][hidden:128].any()
        assert not ours[f"{block}.mlp.fc1.weight"][128 + hidden :].any()
        assert not ours[f"{block}.mlp.fc1.bias"][hidden:128].any()
        assert not ours[f"{block}.mlp.fc2.weight"][:, hidden:].any()
    back = to_published(ours, golden_config)
    assert all(torch.equal(back[name], tensor) for name, tensor in published.items())
    again = from_published(back, golden_config)
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


def test_dtype_is_kept(golden_config, published):
    halves = {name: tensor.bfloat16() for name, tensor in published.items()}
    assert {tensor.dtype for tensor in from_published(halves, golden_config).values()} == {torch.bfloat16}


@pytest.mark.parametrize("overrides", [["entity={kind: scale, sizes: [1, 2, 4, 8, 16]}"], ["data.num_classes=10"]])
def test_other_entities_and_class_counts_go_both_ways(overrides):
    shrink = ["model.dim=16", "model.depth=1", "model.heads=2"]
    config = load_recipe("base", [*shrink, *overrides])
    state = seeded_state(published_shapes(config))
    back = to_published(from_published(state, config), config)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    XAR(config).load_state_dict(from_published(state, config), strict=True)


def test_mask_is_block_causal_and_additive(golden_config):
    mask = derived_buffers(golden_config)["mask"]
    assert mask.shape == (1, 1, 256, 256)
    entity = torch.arange(256) // 64
    expected = torch.where(entity[:, None] >= entity[None], 0.0, -math.inf)
    assert torch.equal(mask[0, 0], expected)


def test_rope_buffers_hold_the_angles_of_the_spec():
    config = load_recipe("base")
    buffers = derived_buffers(config)
    frequencies = [10000 ** (-2 * i / 32) for i in range(16)]
    assert torch.allclose(buffers["rope.freqs"], torch.tensor(frequencies))
    assert buffers["rope.freqs_cos"].shape == (256, 64)
    row, column = build_grouping(config.entity, config.grid).coordinates[200].tolist()
    assert (row, column) == (9, 8)  # token 200 is the ninth of the last cell
    for i in (0, 3, 15):
        for place in (2 * i, 2 * i + 1):
            for table, function in (("rope.freqs_cos", math.cos), ("rope.freqs_sin", math.sin)):
                assert buffers[table][200, place].item() == pytest.approx(function(9 * frequencies[i]), abs=1e-5)
                assert buffers[table][200, 32 + place].item() == pytest.approx(function(8 * frequencies[i]), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("pred.bias"), "1 missing: pred.bias"),
        (lambda s: s.update(surprise=torch.zeros(3)), "1 unknown: surprise"),
        (lambda s: s.update(mask_token=torch.zeros(3)), "1 unknown: mask_token"),  # no derived buffer, as `mask` is
        (lambda s: s.update({"encoder.rope.x": torch.zeros(3)}), "1 unknown: encoder.rope.x"),
        (lambda s: s.update({"pred.bias": torch.zeros(8)}), "1 misshapen: pred.bias is (8), not (16)"),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("encoder_blocks.1.mlp.")],
            "6 missing: encoder_blocks.1.mlp.fc1_g.weight, encoder_blocks.1.mlp.fc1_g.bias, "
            "encoder_blocks.1.mlp.fc1_x.weight and 3 more",
        ),
    ],
)
def test_whatever_does_not_fit_is_refused_by_name(golden_config, published, change, said):
    state = dict(published)
    change(state)
    with pytest.raises(UserError) as error:
        from_published(state, golden_config)
    assert said in error.value.message


def test_our_own_names_are_checked_on_the_way_out(golden_config, published):
    ours = from_published(published, golden_config)
    ours["pos_encoder"] = ours["pos_encoder"][:, :64]
    with pytest.raises(UserError, match=r"pos_encoder is \(1, 64, 32\), not \(1, 256, 32\)"):
        to_published(ours, golden_config)
