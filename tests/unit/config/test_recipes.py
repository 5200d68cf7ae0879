"""Recipes: finding, overriding, validating, writing down; the published settings; the sizes of the networks."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from xar_cli.cli.app import app
from xar_cli.config import (
    Config,
    check_new_run,
    dump_config,
    list_recipes,
    load_config_file,
    load_recipe,
    published_result,
)
from xar_cli.config.recipes import override, validate
from xar_cli.config.reference import config_reference, json_schema
from xar_cli.config.schema import SubsampleEntity, TokenEntity
from xar_cli.errors import UserError
from xar_cli.model import XAR
from xar_cli.model.transformer import count_parameters

PUBLISHED = {
    # name: (dim, depth, heads, steps, guidance, parameters in millions, FID)
    "base": (768, 8, 12, 40, 2.7, 172.6, 1.72),
    "large": (1024, 16, 16, 50, 2.3, 608.4, 1.28),
    "huge": (1280, 20, 16, 50, 2.2, 1186.0, 1.24),
}


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_valid_and_reloads_to_an_equal_object(name, tmp_path):
    config = load_recipe(name)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config_file(path) == config
    assert config.name == name
    check_new_run(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    dim, depth, heads, steps, guidance, parameters, fid = PUBLISHED[name]
    config = load_recipe(name)
    assert (config.model.dim, config.model.depth, config.model.heads) == (dim, depth, heads)
    assert (config.sample.num_steps, config.sample.guidance_scale) == (steps, guidance)
    assert config.sample.solver == "euler_maruyama"
    assert config.published is not None
    assert config.published.fid == fid
    assert (config.grid, config.latent_channels, config.null_label) == ((16, 16), 16, 1000)
    assert (config.entity.kind, config.entity.size) == ("cell", 8)
    assert config.tokenizer.latent_scale == 0.2325
    train = config.train
    assert (train.epochs, train.global_batch_size) == (800, 2048)
    assert train.lr == pytest.approx(4e-4)
    assert (train.warmup_fraction, train.decay_start_fraction, train.min_lr) == (1 / 8, 3 / 4, 1e-5)
    assert (train.betas, train.weight_decay, train.grad_clip) == ((0.9, 0.96), 0.02, 1.0)
    assert (train.label_dropout, config.model.dropout, train.ema_decays[0]) == (0.1, 0.1, 0.9999)
    with torch.device("meta"):
        assert round(count_parameters(XAR(config)) / 1e6, 1) == parameters == config.published.parameters


def test_unknown_recipe_offers_the_nearest():
    with pytest.raises(UserError) as caught:
        load_recipe("hugh")
    assert caught.value.next_step == "Did you mean 'huge'?"
    assert caught.value.exit_code == 2


def test_all_faults_are_reported_at_once_each_with_the_nearest_key():
    with pytest.raises(UserError) as caught:
        load_recipe("base", ["train.global_batch=3", "model.dim=wide", "tokenizer.latent_scael=2", "colour=red"])
    text = caught.value.message
    assert "has 4 faults" in text
    assert "train.global_batch: unknown key; did you mean 'global_batch_size'?" in text
    assert "tokenizer.latent_scael: unknown key for kind kl16; did you mean 'latent_scale'?" in text
    assert "model.dim: Input should be a valid integer" in text
    assert "colour: unknown key" in text


def test_keys_of_another_kind_are_not_offered():
    with pytest.raises(UserError) as caught:
        load_recipe("base", ["entity={kind: scale, sizes: [1, 16], order: raster, resise: area}"])
    assert "entity.order: unknown key for kind scale\n" in caught.value.message
    assert "entity.resise: unknown key for kind scale; did you mean 'resize'?" in caught.value.message


def test_another_kind_by_override_drops_the_keys_of_the_one_before():
    assert load_recipe("base", ["entity.kind=token"]).entity == TokenEntity(kind="token")
    assert load_recipe("base", ["entity.kind=cell"]) == load_recipe("base")
    for overrides in (["entity.kind=subsample", "entity.stride=2"], ["entity.stride=2", "entity.kind=subsample"]):
        assert load_recipe("base", overrides).entity == SubsampleEntity(kind="subsample", stride=2)
    with pytest.raises(UserError, match=r"entity\.stride: unknown key for kind token"):
        load_recipe("base", ["entity.stride=2", "entity.kind=token"])


@pytest.mark.parametrize("key", ["kind", "model.kind"])
def test_a_kind_where_there_are_none_is_an_unknown_key_and_nothing_else(key):
    with pytest.raises(UserError, match=rf"has 1 fault:\n  {key}: unknown key"):
        load_recipe("base", [f"{key}=token"])


def test_the_same_kind_said_again_keeps_what_is_not_said(tmp_path):
    whole, one_key = "tokenizer={kind: pixels, patch: 1}", "tokenizer.patch=1"
    assert load_recipe("tiny", [whole]) == load_recipe("tiny", [one_key])
    assert load_recipe("tiny", [whole]).tokenizer.latent_scale == 1.33
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny\ntokenizer: {kind: pixels, patch: 1}\nentity: {kind: token}\n")
    assert load_recipe(str(path)) == load_recipe("tiny", [one_key, "entity.kind=token"])


def test_a_recipe_may_extend_one_that_extends_another(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nextends: ablations/entity-token\ntrain: {epochs: 7}\n")
    token = load_recipe("ablations/entity-token")
    assert load_recipe(str(path)) == override(token, ["name=mine", "train.epochs=7"])


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_a_shipped_recipe_is_expected_to_give_what_it_was_published_with(name):
    config = load_recipe(name)
    assert published_result(config) == config.published


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("train.epochs=400", False), ("entity.size=4", False), ("data.num_classes=2", False), ("model.dim=384", False),
        ("data.dataset=flowers", False), ("train.context=clean", False), ("name=mine", False),
        ("train.precision=fp16", True), ("train.max_batch_per_rank=8", True), ("train.log_every=7", True),
        ("sample.num_steps=20", True), ("evaluate.count=10000", True),
    ],
)  # fmt: skip
def test_a_changed_recipe_is_expected_to_give_nothing(change, expected):
    assert (published_result(load_recipe("base", [change])) is not None) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["entity.order=center_out"], "entity.order: must be raster or centre_out, or a list of whole numbers"),
        (["entity.size=7"], "entity.size 7 does not divide the 16 x 16 grid"),
        (["model.heads=7"], "must be a whole multiple of 4"),
        (["data.image_size=250"], "data.image_size 250: 250 is not a multiple of the tokenizer's 16 pixels"),
        (["data.image_size=[256, 250]"], "data.image_size 256 x 250: 250 is not a multiple of the tokenizer's 16"),
        (["data.image_size=[256, 384, 3]"], "data.image_size: must be a whole number above 0, the side of a square"),
        (["data.image_size=[0, 256]"], "or two of them, [height, width] (got [0, 256])"),
        (["data.image_size=0"], "data.image_size: must be a whole number above 0"),
        (["data.image_size=256x384"], "data.image_size: must be a whole number above 0"),
        (["data.image_channels=1"], "needs data.image_channels: 3"),
        (["sample.num_steps=1"], "needs num_steps of 2 or more"),
        (["train.decay_start_fraction=0.1"], "must not lie before warmup_fraction"),
        (["train.ema_decays=[1.0]"], "must lie in"),
        (["train.betas=[1.0, 0.96]"], "train.betas.0: Input should be less than 1"),
        (["train.betas=[0.9, -0.1]"], "train.betas.1: Input should be greater than or equal to 0"),
        (["train.seed=18446744073709551616"], "train.seed: Input should be less than 18446744073709551616"),
        (["train.max_batch_per_rank=foo"], "1 fault:\n  train.max_batch_per_rank: must be a whole number above 0"),
        (["train.max_batch_per_rank=0"], "1 fault:\n  train.max_batch_per_rank: must be a whole number above 0"),
        (["sample.num_steps=²"], "sample.num_steps: must be a whole number from 1 to 1000"),
        (["entity={kind: subsample, stride: 3}"], "entity.stride 3 does not divide"),
        (["entity={kind: subsample, stride: [2, 3]}"], "entity.stride 2 x 3 does not divide the 16 x 16 grid"),
        (["entity={kind: scale, sizes: [1, 2, 8]}"], "is not the 16 x 16 grid"),
        (["entity={kind: scale, sizes: [1, 3, 16]}"], "each must divide the last"),
        (["entity={kind: scale, sizes: [4, 4, 16]}"], "must rise"),
        (["entity={kind: scale, sizes: [[1, 4], [2, 2], 16]}"], "entity.sizes (1 x 4, 2 x 2, 16 x 16) must rise"),
        (["entity={kind: scale, sizes: [[4, 3], 16]}"], "each must divide the last"),
        (["entity={kind: scale, sizes: [0, 16]}"], "entity.sizes.0: must be a whole number above 0"),
        (["data.image_size=[128, 192]", "entity={kind: scale, sizes: [1, 8]}"], "8 x 8, is not the 8 x 12 grid"),
        (["data.image_size=[128, 192]", "entity.size=[4, 5]"], "entity.size 4 x 5 does not divide the 8 x 12 grid"),
        (["data.image_size=[128, 192]", "entity={kind: subsample, stride: 3}"], "does not divide the 8 x 12 grid"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        load_recipe("base", overrides)
    assert message in caught.value.message


@pytest.mark.parametrize("command", [("recipes", "validate", "base"), ("train", "--recipe", "base", "--dry-run")])
def test_faults_of_a_new_run_are_told_together(command):
    """They load all the same: runs and weights of earlier versions may hold them."""
    changes = ["train.global_batch_size=32", "evaluate.protocol=adm, admm", "evaluate.count=1"]
    sets = [word for change in changes for word in ("--set", change)]
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(app, [*command, *sets], catch_exceptions=False)
    assert caught.value.message.splitlines() == [
        "The recipe base has 3 faults:",
        "  train.min_lr: 1e-05 is above the peak learning rate, 6.25e-06 (base_lr 5e-05 * 32 / 256): "
        "it would rise at the end",
        "  evaluate.protocol: there is no protocol 'admm'. Did you mean 'adm'?",
        "  evaluate.count: one image is no distribution (got 1)",
    ]
    stored = load_recipe("base", changes)
    assert validate(stored.model_dump(mode="json"), "as stored") == stored


def test_several_protocols_are_no_fault():
    check_new_run(load_recipe("base", ["evaluate.protocol=adm, clean-fid", "evaluate.count=2"]))


@pytest.mark.parametrize("entity", ["{kind: token}", "{kind: image}", "{kind: subsample, stride: 4}"])
def test_other_entities_are_accepted(entity):
    assert load_recipe("base", [f"entity={entity}"]).entity.kind in entity


def test_an_image_size_is_a_side_or_height_and_width():
    config = load_recipe("base", ["data.image_size=[128, 192]", "entity.size=4"])
    assert (config.data.image_shape, config.grid) == ((128, 192), (8, 12))
    assert config.data.size_text == "128 x 192 pixels (height x width)"
    assert validate(config.model_dump(mode="json"), "again") == config
    assert override(config, ["data.image_size=[256, 256]", "entity.size=[8, 8]"]) == load_recipe("base")
    assert load_recipe("base").data.size_text == "256 x 256 pixels"


@pytest.mark.parametrize("text", ["train.epochs", "=3", "name.deeper=3", "model.dim={"])
def test_malformed_overrides(text):
    with pytest.raises(UserError, match="--set"):
        load_recipe("base", [text])


def test_override_keeps_the_rest():
    config = load_recipe("base")
    changed = override(config, ["train.epochs=400", "sample.num_steps=20"])
    assert (changed.train.epochs, changed.sample.num_steps) == (400, 20)
    assert override(changed, ["train.epochs=800", "sample.num_steps=40"]) == config


def test_scientific_notation_without_a_dot_is_a_number():
    assert load_recipe("base", ["train.base_lr=5e-5"]).train.base_lr == 5e-5


def test_the_largest_seed_is_taken():
    config = load_recipe("tiny", [f"train.seed={2**64 - 1}"])
    assert Config.model_validate_json(config.model_dump_json()).train.seed == 2**64 - 1
    torch.Generator().manual_seed(config.train.seed)


def test_numbers_are_read_to_the_base_10(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny\ndata: {num_images: 0100}\nsample: {num_steps: 010}\ntrain: {seed: 1_000}\n")
    config = load_recipe(str(path), ["train.epochs=010", "train.global_batch_size=+032"])
    assert (config.data.num_images, config.sample.num_steps, config.train.seed) == (100, 10, 1000)
    assert (config.train.epochs, config.train.global_batch_size) == (10, 32)


@pytest.mark.parametrize("value", ["0x10", "0b11", "1:30", "0b_", "2026-02-30", "on", "yes", "true"])
def test_what_is_no_decimal_number_is_text(value):
    key, name = "train.global_batch_size", f"name={value}"
    with pytest.raises(UserError, match=rf"{key}: Input should be a valid integer.*\(got '{value}'\)"):
        load_recipe("tiny", [f"{key}={value}"])
    assert load_recipe("tiny", [name]).name == value


@pytest.mark.parametrize(("value", "means"), [("on", True), ("no", False), ("True", True), ("false", False)])
def test_true_and_false_are_taken_where_they_are_asked_for(value, means):
    assert load_recipe("tiny", [f"train.compile={value}"]).train.compile is means


def test_a_name_that_looks_like_another_value_survives_being_written_down(tmp_path):
    for name in ("010", "0x10", "089", "2026-02-28", "on", "1:30", "1e5"):
        config = validate(load_recipe("tiny").model_dump(mode="json") | {"name": name}, "x")
        path = tmp_path / "config.yaml"
        path.write_text(dump_config(config))
        assert load_config_file(path) == config


def test_a_key_given_twice_is_refused_with_its_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny\ntrain: {epochs: 3}\nname: mine\ntrain: {seed: 2}\n")
    with pytest.raises(UserError, match=r"'train' stands there twice.* line 4, column 1") as caught:
        load_recipe(str(path))
    assert caught.value.next_step == "Mend the file at that place."
    with pytest.raises(UserError, match="'epochs' stands there twice"):
        load_recipe("tiny", ["train={epochs: 3, seed: 1, epochs: 4}"])


def test_merge_keys_may_say_a_key_again(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny\nmodel: {<<: {depth: 1, heads: 2}, <<: {dim: 64}, depth: 3}\n")
    config = load_recipe(str(path))
    assert (config.model.dim, config.model.depth, config.model.heads) == (64, 3, 2)


@pytest.mark.parametrize("content", ["- a list\n", "a: [1\n", "a: !!int b\n", None])
def test_unreadable_files(content, tmp_path):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError):
        load_recipe(str(path))


def test_config_is_frozen():
    config = load_recipe("tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]


def test_json_schema_describes_every_key():
    schema = json.loads(json_schema())
    assert schema["properties"]["train"]
    fields = schema["$defs"]["TrainConfig"]["properties"]
    assert all("description" in field for field in fields.values())


def fits(value, rule, whole) -> bool:
    """Whether a value fits a JSON Schema, of whose words these are looked at."""
    if "$ref" in rule:
        return fits(value, whole["$defs"][rule["$ref"].rpartition("/")[2]], whole)
    if "if" in rule and fits(value, rule["if"], whole) and not fits(value, rule["then"], whole):
        return False
    if "not" in rule and fits(value, rule["not"], whole):
        return False
    if "anyOf" in rule and not any(fits(value, option, whole) for option in rule["anyOf"]):
        return False
    if "const" in rule and value != rule["const"]:
        return False
    if rule.get("type") in ("object", "null") and isinstance(value, dict) != (rule["type"] == "object"):
        return False
    if not isinstance(value, dict):
        return True
    known, keys = rule.get("properties", {}), value.keys()
    unknown = rule.get("additionalProperties", True) is False and keys - known.keys()
    fields = all(fits(value[key], known[key], whole) for key in keys & known.keys())
    return fields and not unknown and keys >= set(rule.get("required", ()))


def test_an_editor_takes_every_shipped_recipe_and_sees_what_is_wrong():
    schema = json.loads(json_schema())
    files = {name: yaml.safe_load(path.read_text()) for name, path in list_recipes().items()}
    assert all(fits(values, schema, schema) for values in files.values())
    base, token = files["base"], files["ablations/entity-token"]
    assert fits({"extends": "base", "entity": {"order": "centre_out"}}, schema, schema)
    for wrong in (
        {key: value for key, value in base.items() if key != "sample"},
        {**base, "train": {**base["train"], "epohcs": 3}},
        {**base, "train": {key: value for key, value in base["train"].items() if key != "epochs"}},
        {**base, "entity": {"kind": "cell"}},
        {**base, "entity": {"size": 8}},
        {**base, "published": {"fid": 1.0}},
        {**token, "colour": "red"},
        {**token, "entity": {"kind": "token", "size": 1}},
    ):
        assert not fits(wrong, schema, schema), wrong


def test_extends_misspelt_is_offered(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extend: base\n")
    with pytest.raises(UserError, match="extend: unknown key; did you mean 'extends'"):
        load_recipe(str(path))


def test_a_recipe_does_not_extend_another_by_set():
    with pytest.raises(UserError, match="by what stands in its file") as caught:
        load_recipe("tiny", ["extends=base"])
    assert caught.value.next_step == "For example: --recipe base."


@pytest.mark.parametrize("value", ["!!bool foo", "!!timestamp foo", "!!int foo", "!!no foo"])
def test_a_value_that_its_tag_does_not_allow(tmp_path, value):
    with pytest.raises(UserError, match="is not a YAML value"):
        load_recipe("tiny", [f"name={value}"])
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: tiny\nname: {value}\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_recipe(str(path))


def test_validate_names_its_source():
    with pytest.raises(UserError, match=r"^my\.yaml has"):
        validate({}, "my.yaml")
    assert isinstance(validate(load_recipe("tiny").model_dump(mode="json"), "x"), Config)


def test_the_config_reference_in_docs_is_what_the_schema_says():
    page = Path(__file__).resolve().parents[3] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == config_reference(), "run: xar recipes schema --markdown > docs/config.md"


# Paper, Tables 3 to 5: xAR-B at 400 epochs. (file, table, entity, context, FID, IS)
CELL = {"kind": "cell", "size": 8, "order": "raster"}
ABLATIONS = [
    ("entity-token", 3, {"kind": "token", "order": "raster"}, "random", "3.51", "251.4"),
    ("entity-subsample", 3, {"kind": "subsample", "stride": 2, "order": "raster"}, "random", "3.58", "231.5"),
    ("entity-image", 3, {"kind": "image"}, "random", "3.13", "253.4"),
    ("entity-scale", 3, {"kind": "scale", "sizes": (1, 2, 4, 8, 16), "resize": "area"}, "random", "2.90", "262.8"),
    ("entity-cell", 3, CELL, "random", "2.48", "269.2"),
    ("cell-1", 4, CELL | {"size": 1}, "random", "3.51", None),
    ("cell-2", 4, CELL | {"size": 2}, "random", "3.04", None),
    ("cell-4", 4, CELL | {"size": 4}, "random", "2.61", None),
    ("cell-8", 4, CELL, "random", "2.48", None),
    ("cell-16", 4, CELL | {"size": 16}, "random", "3.13", None),
    ("context-clean", 5, CELL, "clean", "3.45", None),
    ("context-increasing", 5, CELL, "increasing", "2.95", None),
    ("context-decreasing", 5, CELL, "decreasing", "2.78", None),
    ("context-random", 5, CELL, "random", "2.48", None),
]


def header_of(name: str) -> list[str]:
    """The comment that a recipe opens with, line by line."""
    lines = list_recipes()[name].read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]


def test_the_table_of_ablations_is_the_folder():
    assert {f"ablations/{row[0]}" for row in ABLATIONS} == {name for name in list_recipes() if "/" in name}


@pytest.mark.parametrize(("name", "table", "entity", "context", "fid", "inception_score"), ABLATIONS)
def test_ablations_are_base_for_400_epochs_with_one_change(name, table, entity, context, fid, inception_score):
    config, base = load_recipe(f"ablations/{name}"), load_recipe("base")
    assert config.entity.model_dump() == entity
    assert config.train == base.train.model_copy(update={"epochs": 400, "context": context})
    for section in ("data", "tokenizer", "model", "sample", "evaluate"):
        assert getattr(config, section) == getattr(base, section)


@pytest.mark.parametrize(("name", "table", "entity", "context", "fid", "inception_score"), ABLATIONS)
def test_ablations_state_what_the_paper_prints(name, table, entity, context, fid, inception_score):
    config = load_recipe(f"ablations/{name}")
    published, words = config.published, f"FID {fid}, IS {inception_score}" if inception_score else f"FID {fid}"
    assert published is not None
    found = published.fid, published.inception_score, published.source
    assert found == (
        float(fid), float(inception_score) if inception_score else None, f"arXiv 2502.20388, Table {table}"
    )  # fmt: skip
    assert published.parameters == (None if config.entity.kind == "scale" else 172.6)  # of the same network
    assert (published.precision, published.recall, published.images_per_second) == (None, None, None)
    assert header_of(f"ablations/{name}")[0] == f"xAR-B for 400 epochs: {words} (paper, Table {table})."
    assert config.description == f"xAR-B, 400 epochs, FID {fid} (Table {table}, {name.replace('-', ' ')})"


@pytest.mark.parametrize("name", list_recipes())
def test_the_command_that_a_recipe_opens_with_plans_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = " ".join(header_of(name)).replace("\\ ", "")
    command = re.search(r"xar (train --recipe \S+) --data \S+ (--out runs/\S+(?: --[a-z-]+ \S+)*)", text)
    assert command is not None
    words = f"{command[1]} {command[2]} --dry-run --json".replace("--node-rank R", "--node-rank 0").split()
    assert words[2] == name
    assert words[4] == f"runs/{name.rpartition('/')[2]}"
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    plan, config = json.loads(result.stdout), load_recipe(name)
    ranks = {"tiny": 1, "huge": 64}.get(name, 8)
    assert plan["world_size"] == ranks
    assert plan["batch_size_per_rank"] * plan["accumulation_steps"] * ranks == config.train.global_batch_size
    images = config.train.epochs * config.data.num_images
    assert plan["total_steps"] == math.ceil(images / config.train.global_batch_size)


def test_a_recipe_that_extends_no_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nextends: bsae\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert "Did you mean 'base'?" in caught.value.next_step
