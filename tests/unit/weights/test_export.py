"""Weights out: exact to the bit, whole or not at all, with the recipe and the class table inside."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from xar_cli import tensor_files
from xar_cli.config import load_recipe
from xar_cli.errors import UserError
from xar_cli.lock import JobLock
from xar_cli.weights import export_weights, load_weights, open_weights
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


def test_an_export_carries_its_epoch(training_file, golden_config, tmp_path):
    export_weights(open_weights(training_file, golden_config), tmp_path / "out.safetensors")
    assert open_weights(tmp_path / "out.safetensors").epoch == 399


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


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_failed_write_leaves_the_old_file_and_no_other(run_folder, tmp_path, monkeypatch, suffix):
    out = tmp_path / "new" / f"out.{suffix}"
    out.parent.mkdir()
    out.write_text("old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match=f"'{out}' could not be written: .*No space left") as error:
        export_weights(open_weights(run_folder), out)
    assert error.value.exit_code == 1
    assert out.read_text() == "old"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_full_disk_is_a_sentence_whatever_error_a_library_has_for_it(run_folder, tmp_path, monkeypatch, suffix):
    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if len(data) > 1000:  # a few bytes have room: torch ends the file, and finds its length wrong
                raise OSError(28, "No space left on device")
            return len(data)

    def fail(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    weights = open_weights(run_folder)
    monkeypatch.setattr(tensor_files, "save_file", fail)
    if suffix == "pth":
        monkeypatch.setattr(Path, "open", lambda *_: Full())
    with pytest.raises(UserError, match=r"could not be written: .*No space left") as error:
        export_weights(weights, tmp_path / f"out.{suffix}")
    assert error.value.exit_code == 1


def test_what_was_written_is_on_the_disk_before_it_has_its_name(run_folder, tmp_path, monkeypatch):
    out, flushed = tmp_path / "out.pth", []
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append((os.fstat(descriptor).st_ino, out.exists())))
    export_weights(open_weights(run_folder), out)
    assert flushed == [(out.stat().st_ino, False)]


def test_what_a_killed_process_left_is_removed_and_another_at_work_is_not_disturbed(run_folder, tmp_path):
    out = tmp_path / "new" / "out[1].pth"
    left, *others = (out.parent / f".{name}.123.tmp" for name in (out.name, "out1.pth", f"{out.name}.b.pth"))
    for folder in (left, *others):
        folder.mkdir(parents=True)
        (folder / out.name).touch()
    with JobLock(out.parent / f".{out.name}.lock", "") as lock:
        lock.take()
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()}"):
            export_weights(open_weights(run_folder), out)
        assert left.exists()
    export_weights(open_weights(run_folder), out)
    assert sorted(out.parent.iterdir()) == sorted([out, *others])


@pytest.mark.parametrize("link", [False, True])
def test_the_file_that_the_weights_are_read_from_stays(bare_file, golden_config, tmp_path, link):
    before, out = bare_file.read_bytes(), bare_file
    if link:
        out = tmp_path / "link.pth"
        out.hardlink_to(bare_file)
    with pytest.raises(UserError, match="is the file that the weights are read from"):
        export_weights(open_weights(bare_file, golden_config), out)
    assert bare_file.read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "mine.pth"])
def test_nothing_is_put_into_a_checkpoint(run_folder, name):
    (folder,) = (run_folder / "checkpoints").iterdir()
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    with pytest.raises(UserError, match="would lie in a checkpoint") as error:
        export_weights(open_weights(run_folder), folder / name)
    assert "outside" in error.value.next_step
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


def test_a_folder_is_no_place_for_the_file(run_folder, tmp_path):
    (tmp_path / "out.pth").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        export_weights(open_weights(run_folder), tmp_path / "out.pth")
    assert not any((tmp_path / "out.pth").iterdir())


@pytest.mark.parametrize("layout", ["xar", "published"])
def test_two_names_of_one_tensor_are_written_as_two(published, golden_config, tmp_path, layout):
    tied = published | {"decoder_pos_embed_learned": published["encoder_pos_embed_learned"]}
    torch.save(tied, tmp_path / "tied.pth")
    export_weights(open_weights(tmp_path / "tied.pth", golden_config), tmp_path / "out.safetensors", layout)
    model, _ = load_weights(tmp_path / "out.safetensors", golden_config, device="cpu")
    assert torch.equal(model.pos_decoder, published["encoder_pos_embed_learned"])
