"""Every kind of source gives the right weights; a wrong one is refused with what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.seeded import seeded_state
from tests.weight_files import save_safetensors
from xar_cli import checkpoint
from xar_cli.checkpoint import require_checkpoint
from xar_cli.config import load_recipe
from xar_cli.errors import UserError
from xar_cli.tensor_files import read_tensor_file
from xar_cli.weights import export_weights, files, from_published, load_weights, open_weights
from xar_cli.weights.info import describe_source
from xar_cli.weights.published import published_shapes


def assert_holds(model, published, add=0.0):
    """The network's weights are the published ones plus a constant."""
    from xar_cli.weights import to_published

    back = to_published(model.state_dict(), model_config(model))
    assert all(torch.equal(back[name], tensor + add) for name, tensor in published.items())


def model_config(model):
    heads = model.encoder[0].attention.heads
    return load_recipe("base", ["model.dim=32", f"model.depth={len(model.encoder)}", f"model.heads={heads}"])


def test_a_bare_published_file(bare_file, golden_config, published):
    model, weights = load_weights(bare_file, golden_config, device="cpu")
    assert_holds(model, published)
    assert (weights.layout, weights.kind, weights.epoch, weights.dtypes) == (
        "published", "unstated", None, ["float32"],
    )  # fmt: skip
    assert weights.sha256 == hashlib.sha256(bare_file.read_bytes()).hexdigest()
    assert not model.training


def test_the_loaded_network_computes_the_golden_velocity(bare_file, golden, golden_config):
    model, _ = load_weights(bare_file, golden_config, device="cpu")
    x = model.grouping.to_tokens(golden["train.latents"])
    t = golden["train.timesteps"].repeat_interleave(64, dim=1)[..., None]
    x_t = (1 - t) * x + t * golden["train.noise"].flatten(1, 2)
    velocity = model(x_t, golden["train.timesteps"], golden["train.labels"])
    error = (velocity - golden["train.velocity"]).abs().max() / golden["train.velocity"].abs().max()
    assert error <= 1e-5


def test_weights_are_loaded_in_the_dtype_asked_for_and_positions_stay_exact(bare_file, golden_config):
    exact, _ = load_weights(bare_file, golden_config, device="cpu")
    half, _ = load_weights(bare_file, golden_config, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.rope, exact.rope)
    assert torch.equal(half.pos_encoder, exact.pos_encoder.bfloat16())


def test_the_originals_checkpoint_gives_the_average_or_the_raw_weights(training_file, golden_config, published):
    average, weights = load_weights(training_file, golden_config, device="cpu")
    assert_holds(average, published, add=1)
    assert (weights.kind, weights.epoch) == ("ema", 399)
    raw, weights = load_weights(training_file, golden_config, ema=False, device="cpu")
    assert_holds(raw, published)
    assert weights.kind == "raw"


def test_a_run_gives_its_first_average_or_its_raw_weights_and_its_own_recipe(run_folder, published):
    average, weights = load_weights(run_folder, device="cpu")
    assert_holds(average, published, add=1)
    assert (weights.kind, weights.step, weights.config.model.dim) == ("ema", 1234, 32)
    assert weights.class_names[7] == "class 7"
    raw, _ = load_weights(run_folder, ema=False, device="cpu")
    assert_holds(raw, published)


def test_a_checkpoint_folder_and_a_file_in_it_are_sources_too(run_folder, published):
    folder = run_folder / "checkpoints" / "step-00001234"
    assert_holds(load_weights(folder, device="cpu")[0], published, add=1)
    model, weights = load_weights(folder / "ema-0.9.safetensors", device="cpu")
    assert_holds(model, published, add=2)
    assert weights.kind == "ema"
    assert open_weights(folder / "model.safetensors").kind == "raw"


def test_bare_safetensors_of_either_layout(published, golden_config, tmp_path):
    ours = save_safetensors(from_published(published, golden_config), tmp_path / "ours.safetensors")
    theirs = save_safetensors(published, tmp_path / "theirs.safetensors")
    for path in (ours, theirs):
        assert_holds(load_weights(path, golden_config, device="cpu")[0], published)


def test_pickles_from_before_pytorch_1_6_are_read_too(published, golden_config, tmp_path):
    torch.save(published, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_holds(load_weights(tmp_path / "old.pth", golden_config, device="cpu")[0], published)


@pytest.mark.parametrize("name", ["base", "large", "huge"])
def test_the_recipe_follows_from_the_shapes(name, tmp_path):
    shapes = published_shapes(load_recipe(name))
    torch.save({key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}, tmp_path / "hollow.pth")
    assert open_weights(tmp_path / "hollow.pth").config == load_recipe(name)


def test_a_wrong_recipe_is_contradicted_and_the_right_one_named(tmp_path):
    shapes = published_shapes(load_recipe("large"))
    torch.save({key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}, tmp_path / "hollow.pth")
    with pytest.raises(UserError) as error:
        open_weights(tmp_path / "hollow.pth", load_recipe("huge"))
    assert "width 1024, 16 + 16 blocks" in error.value.message
    assert "'huge' asks for width 1280, 20 + 20 blocks" in error.value.message
    assert "--recipe large" in error.value.next_step


def test_the_number_of_heads_is_read_from_the_buffers_where_the_file_has_them(bare_file, golden_config):
    wrong = golden_config.model_copy(update={"model": golden_config.model.model_copy(update={"heads": 4})})
    with pytest.raises(UserError, match=r"2 heads.*asks for.*4 heads"):
        open_weights(bare_file, wrong)


def test_a_network_that_no_recipe_has_asks_for_the_recipe(bare_file):
    with pytest.raises(UserError) as error:
        open_weights(bare_file)
    assert "width 32, 2 + 2 blocks" in error.value.message
    assert "--recipe" in error.value.next_step


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("entity.size=4", "entity"),
        ("model.heads=4", "heads 2"),
        ("tokenizer.latent_scale=0.18", "tokenizer"),
    ],
)
def test_what_a_run_states_is_contradicted_loudly(run_folder, golden_config, override, said):
    settings = ["model.dim=32", "model.depth=2", "model.heads=2", override]
    with pytest.raises(UserError, match=said):
        open_weights(run_folder, load_recipe("base", settings))


def test_other_sampling_settings_are_no_contradiction(run_folder, tmp_path):
    settings = ["model.dim=32", "model.depth=2", "model.heads=2", "sample.num_steps=7", "model.dropout=0"]
    asked = load_recipe("base", settings)
    assert open_weights(run_folder, asked).config == asked
    export_weights(open_weights(run_folder), tmp_path / "out.safetensors")
    assert open_weights(tmp_path / "out.safetensors", asked).config.sample.num_steps == 7


def test_raw_weights_that_are_not_there_are_not_replaced_by_others(bare_file, run_folder, golden_config, tmp_path):
    export_weights(open_weights(run_folder), tmp_path / "average.safetensors")
    export_weights(open_weights(bare_file, golden_config), tmp_path / "unstated.safetensors")
    for source in (bare_file, tmp_path / "average.safetensors", tmp_path / "unstated.safetensors"):
        with pytest.raises(UserError, match="raw"):
            open_weights(source, golden_config, ema=False)


def test_averages_that_are_not_there_are_not_replaced_by_others(published, golden_config, tmp_path):
    torch.save({"model": published, "epoch": 3}, tmp_path / "raw.pth")
    with pytest.raises(UserError, match="no averaged weights") as error:
        open_weights(tmp_path / "raw.pth", golden_config)
    assert "--raw" in error.value.next_step
    assert open_weights(tmp_path / "raw.pth", golden_config, ema=False).epoch == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"post_quant_conv.weight": torch.zeros(1)}, "tokenizer KL-16"),
        ({"model": {"post_quant_conv.weight": torch.zeros(1)}}, "tokenizer KL-16"),
        ({"fc.weight": torch.zeros(1)}, "no xAR weights: its first tensors are fc.weight"),
        ({"epoch": 3}, "holds no weights"),
        ({}, "holds no weights"),
        ([1, 2], "holds no weights"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=said):
        open_weights(tmp_path / "other.pth")


def test_damaged_files_are_refused(bare_file, run_folder, golden_config, tmp_path):
    export_weights(open_weights(run_folder), tmp_path / "whole.safetensors")
    for path in (bare_file, tmp_path / "whole.safetensors"):
        cut = tmp_path / f"cut{path.suffix}"
        cut.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(UserError, match=r"cannot be read|no file of weights"):
            open_weights(cut, golden_config)
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("not weights at all")
    for name in ("empty.pth", "text.pth", "none.pth"):
        with pytest.raises(UserError):
            open_weights(tmp_path / name)


def test_a_damaged_checkpoint_is_refused_by_every_way_to_it(run_folder, tmp_path):
    """Its bytes are read as they are by the format itself: the checksum alone tells."""
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    (folder,) = (copy / "checkpoints").iterdir()
    average = next(folder.glob("ema-*.safetensors"))
    damaged = bytearray(average.read_bytes())
    damaged[-100:-50] = b"\x7f" * 50
    average.write_bytes(damaged)
    for source in (copy, folder, average):
        with pytest.raises(UserError, match="fails its checksum"):
            open_weights(source)
    assert open_weights(folder / "model.safetensors").kind == "raw"  # that one is whole
    assert open_weights(copy, ema=False).kind == "raw"
    (folder / "state.json").write_text("{")
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match=r"is damaged: state\.json"):
            open_weights(source)


def test_only_the_set_that_is_wanted_is_read_and_once(run_folder, monkeypatch):
    (folder,) = (run_folder / "checkpoints").iterdir()
    read, crc32 = [], checkpoint._crc32
    monkeypatch.setattr(checkpoint, "_crc32", lambda path: read.append(path.name) or crc32(path))
    for source, ema, expected in (
        (run_folder, False, ["model.safetensors"]),
        (folder, False, ["model.safetensors"]),
        (folder, True, ["ema-0.9999.safetensors", "ema-0.9.safetensors"]),
        (folder / "ema-0.9.safetensors", True, ["ema-0.9.safetensors"]),
    ):
        read.clear()
        describe_source(source, ema=ema)
        assert read == expected


def test_a_link_to_a_checkpoint_or_to_a_file_in_it_is_what_it_leads_to(run_folder, tmp_path):
    (folder,) = (run_folder / "checkpoints").iterdir()
    (tmp_path / "best").symlink_to(folder)
    (tmp_path / "best.safetensors").symlink_to(folder / "ema-0.9999.safetensors")
    for source in ("best", "best/ema-0.9999.safetensors", "best.safetensors"):
        weights = open_weights(tmp_path / source)
        assert (weights.kind, weights.step, weights.class_names[7]) == ("ema", 1234, "class 7")
    with (folder / "ema-0.9999.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    for source in ("best", "best/ema-0.9999.safetensors", "best.safetensors"):
        with pytest.raises(UserError, match="fails its checksum"):
            open_weights(tmp_path / source)


@pytest.mark.parametrize("state", [None, {}, {"files": 3}, []])
def test_another_file_beside_a_state_is_no_part_of_a_checkpoint(run_folder, published, golden_config, tmp_path, state):
    (folder,) = (run_folder / "checkpoints").iterdir()
    if state is not None:  # of another program
        folder = tmp_path / "step-1"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps(state))
    torch.save(published, folder / "mine.pth")
    assert open_weights(folder / "mine.pth", golden_config).kind == "unstated"


@pytest.mark.parametrize("state", ["not json", '{"some": "program"}', '"text"'])
def test_a_state_of_another_program_makes_no_checkpoint(bare_file, golden_config, tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    export_weights(open_weights(bare_file, golden_config), tmp_path / "out.safetensors")
    assert open_weights(tmp_path / "out.safetensors").kind == "unstated"


def test_nothing_is_put_beside_a_damaged_state_of_a_checkpoint(run_folder):
    (folder,) = (run_folder / "checkpoints").iterdir()
    weights = open_weights(run_folder)
    (folder / "state.json").write_text("not json")
    with pytest.raises(UserError, match="would lie in a checkpoint"):
        export_weights(weights, folder / "out.safetensors")


def test_a_checkpoint_without_the_set_that_is_asked_for(run_folder):
    (folder,) = (run_folder / "checkpoints").iterdir()
    state = json.loads((folder / "state.json").read_text())
    for file, ema, kind in (("model", False, "raw"), ("ema-0.9999", True, "averaged"), ("ema-0.9", True, "averaged")):
        del state["files"][f"{file}.safetensors"]
        (folder / "state.json").write_text(json.dumps(state))
        if file != "ema-0.9999":  # there is a second average
            with pytest.raises(UserError, match=f"has no {kind} weights"):
                open_weights(run_folder, ema=ema)


def test_a_checkpoint_that_a_run_removes_meanwhile_is_a_sentence(run_folder, monkeypatch):
    def removed(run, files):
        checkpoint = require_checkpoint(run, files)
        shutil.rmtree(checkpoint.folder)
        return checkpoint

    monkeypatch.setattr(files, "require_checkpoint", removed)
    with pytest.raises(UserError, match="was removed while it was opened") as caught:
        open_weights(run_folder)
    assert caught.value.exit_code == 1


def test_an_average_is_not_taken_for_raw_weights(run_folder):
    average = next(run_folder.glob("checkpoints/*/ema-*.safetensors"))
    with pytest.raises(UserError, match="does not hold raw weights"):
        open_weights(average, ema=False)


@pytest.mark.parametrize("lacks", ["kind", "recipe", "class_names"])
def test_an_export_that_lost_what_it_says_is_refused(run_folder, tmp_path, lacks):
    path = tmp_path / "out.safetensors"
    export_weights(open_weights(run_folder), path)
    content, metadata = read_tensor_file(path)
    del metadata[lacks]
    save_file(content, tmp_path / "less.safetensors", metadata)
    with pytest.raises(UserError, match=f"damaged: KeyError: '{lacks}'"):
        open_weights(tmp_path / "less.safetensors")


@pytest.mark.parametrize("class_names", ['"abc"', "[1, 2]", '{"a": 1}', "3"])
def test_class_names_of_an_export_are_a_list_of_strings(run_folder, tmp_path, class_names):
    export_weights(open_weights(run_folder), tmp_path / "out.safetensors")
    content, metadata = read_tensor_file(tmp_path / "out.safetensors")
    save_file(content, tmp_path / "other.safetensors", metadata | {"class_names": class_names})
    with pytest.raises(UserError, match="damaged: TypeError: class_names is no list of strings"):
        open_weights(tmp_path / "other.safetensors")


def test_a_kind_that_this_program_does_not_know_is_unstated(run_folder, tmp_path):
    export_weights(open_weights(run_folder), tmp_path / "out.safetensors")
    content, metadata = read_tensor_file(tmp_path / "out.safetensors")
    save_file(content, tmp_path / "other.safetensors", metadata | {"kind": "median"})
    assert open_weights(tmp_path / "other.safetensors").kind == "unstated"


@pytest.mark.parametrize("shape", [(), (16,), (256, 0), (256, 64), (256, 5)])
def test_a_table_of_positions_that_tells_no_heads_is_passed_over(published, golden_config, tmp_path, shape):
    torch.save(published | {"encoder_blocks.0.attn.rope.freqs_cos": torch.zeros(shape)}, tmp_path / "odd.pth")
    weights = open_weights(tmp_path / "odd.pth", golden_config)
    assert "heads" not in weights.network


def test_a_table_without_dimensions_is_no_network(published, tmp_path):
    torch.save({**published, "class_emb.weight": torch.zeros(())}, tmp_path / "flat.pth")
    with pytest.raises(UserError, match="holds no xAR weights"):
        open_weights(tmp_path / "flat.pth")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        open_weights(tmp_path)


def test_loading_leaves_the_file_as_it_was(bare_file, golden_config):
    before = bare_file.read_bytes()
    model, weights = load_weights(bare_file, golden_config, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    again = weights.load("cpu")  # the mapped tensors were let go, and are read again
    assert torch.equal(again.pos_encoder + 1, model.pos_encoder)
    assert bare_file.read_bytes() == before


def test_seeded_weights_differ_by_seed():
    shapes = {"a.weight": (4, 4)}
    assert not torch.equal(seeded_state(shapes, 1)["a.weight"], seeded_state(shapes, 2)["a.weight"])
