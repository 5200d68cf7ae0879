"""Weights out: exact to the bit, whole or not at all, with the recipe and the class table inside."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from xar_cli.config import load_recipe
from xar_cli.errors import UserError
from xar_cli.weights import export_weights, open_weights
from xar_cli.weights.export import class_table
from xar_cli.weights.published import is_derived


def test_round_trips_between_all_forms_are_exact(bare_file, golden_config, published, tmp_path):
    forms = [
        (tmp_path / "ours.safetensors", None),
        (tmp_path / "published.pth", None),
        (tmp_path / "published.safetensors", "published"),
        (tmp_path / "again.safetensors", "xar"),
        (tmp_path / "last.pth", "published"),
    ]
    source = bare_file
    for out, layout in forms:
        export_weights(open_weights(source, golden_config), out, layout)
        source = out
    last = torch.load(source, weights_only=True)
    assert {name for name in last if not is_derived(name)} == set(published)
    assert all(torch.equal(last[name], tensor) for name, tensor in published.items())
    first, again = (load_file(tmp_path / name) for name in ("ours.safetensors", "again.safetensors"))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert set(first) == set(again)


def test_a_published_export_loads_strictly_buffers_included(run_folder, tmp_path):
    export_weights(open_weights(run_folder), tmp_path / "out.pth")
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert state["mask"].shape == (1, 1, 256, 256)
    for stack in ("encoder", "decoder"):
        for index in range(2):
            assert state[f"{stack}_blocks.{index}.attn.rope.freqs"].shape == (4,)
            assert state[f"{stack}_blocks.{index}.attn.rope.freqs_sin"].shape == (256, 16)


def test_half_precision_stays_half_precision(published, golden_config, tmp_path):
    torch.save({name: tensor.half() for name, tensor in published.items()}, tmp_path / "half.pth")
    export_weights(open_weights(tmp_path / "half.pth", golden_config), tmp_path / "out.safetensors")
    assert open_weights(tmp_path / "out.safetensors").dtypes == ["float16"]


def test_an_export_carries_its_recipe_its_classes_and_where_it_is_from(run_folder, tmp_path):
    original = open_weights(run_folder)
    export_weights(original, tmp_path / "out.safetensors")
    export = open_weights(tmp_path / "out.safetensors")
    assert export.config == original.config
    assert (export.kind, export.step, export.class_names) == ("ema", 1234, original.class_names)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        entity = json.loads(file.metadata()["recipe"])["entity"]
    assert (entity["kind"], entity["size"]) == ("cell", 8)


def test_published_weights_get_imagenets_class_table(bare_file, golden_config, tmp_path):
    export_weights(open_weights(bare_file, golden_config), tmp_path / "out.safetensors")
    names = open_weights(tmp_path / "out.safetensors").class_names
    assert (len(names), names[0]) == (1000, "n01440764")
    assert class_table(load_recipe("tiny")) == ()


def test_an_export_from_a_newer_program_is_refused(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("xar_cli.weights.export.VERSION", "2")
    export_weights(open_weights(run_folder), tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="version 2"):
        open_weights(tmp_path / "out.safetensors")


@pytest.mark.parametrize(("name", "layout"), [("out.bin", None), ("out.pth", "xar")])
def test_forms_that_do_not_exist_are_refused_and_nothing_is_written(run_folder, tmp_path, name, layout):
    with pytest.raises(UserError):
        export_weights(open_weights(run_folder), tmp_path / "new" / name, layout)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_found_before_anything_is_written(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="Not enough disk space"):
        export_weights(open_weights(run_folder), tmp_path / "new" / "out.pth")
    assert not (tmp_path / "new").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(run_folder, tmp_path, monkeypatch):
    out = tmp_path / "new" / "out.pth"
    out.parent.mkdir()
    out.write_text("old")

    def fail(state, path):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_weights(open_weights(run_folder), out)
    assert out.read_text() == "old"
    assert [path.name for path in out.parent.iterdir()] == ["out.pth"]
