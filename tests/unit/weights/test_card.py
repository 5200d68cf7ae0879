"""The model card says what the model is, and no number without its protocol."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from xar_cli.cli.app import main
from xar_cli.errors import UserError
from xar_cli.evaluate.results import Evaluation, Metric, ProtocolResult, SetFacts
from xar_cli.weights import export_weights, open_weights
from xar_cli.weights.card import model_card, read_results, write_model_folder

RESULT = {
    "samples": {"name": "samples/mine", "sha256": "11" * 32, "count": 50000},
    "reference": {"name": "refs/VIRTUAL_imagenet256.npz", "sha256": "ab" * 32, "count": 10000},
    "protocols": {
        "adm": {
            "protocol": "adm",
            "metrics": {
                "fid": {"name": "FID", "value": 2.3456, "error": 0.031, "note": "", "higher_is_better": False},
                "is": {"name": "IS", "value": 280.44, "error": None, "note": "", "higher_is_better": True},
            },
        }
    },
}


def test_card_of_a_run(run_folder):
    card = model_card(open_weights(run_folder), "someone/my-xar", [RESULT], "mit")
    assert "license: mit" in card
    assert "hf://someone/my-xar/model.safetensors" in card
    assert "--tokenizer-weights kl16.ckpt" in card
    assert "step 1234" in card
    assert "entity cell, 8" in card
    where = "adm | 50000 | VIRTUAL_imagenet256.npz (sha256 abababababab) |"
    assert f"| FID | 2.346 ± 0.031 | {where}" in card
    assert f"| IS | 280.4 | {where}" in card
    assert "not a result of these weights" in card


def test_the_output_of_xar_fid_is_what_a_card_reads(tmp_path, capsys):
    """The two stages meet through a file: what one prints today, the other must understand."""
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        (tmp_path / "images" / "0").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / "0" / f"{index}.png")
    words = ["fid", "--samples", "IMAGES", "--reference", "IMAGES", "--protocol", "digits", "--json"]
    arguments = [str(tmp_path / "images") if word == "IMAGES" else word for word in words]
    with pytest.raises(SystemExit):
        main([*arguments, "--no-feature-cache"])
    (tmp_path / "fid.json").write_text(capsys.readouterr().out)
    assert "digits" in read_results(tmp_path / "fid.json")["protocols"]


def test_metrics_that_were_not_computed_have_no_row(tmp_path, run_folder):
    found = Evaluation(
        SetFacts("samples/mine", "11" * 32, 50000),
        SetFacts("adm_in256_stats.npz", "ab" * 32, 0),
        {
            "adm": ProtocolResult(
                "adm", "as ADM", "inception", "bilinear", "cd" * 32, True, "fp32",
                {
                    "fid": Metric("fid", "FID", 2.3456, 0.031),
                    "precision": Metric("precision", "precision", None, note="needs reference images, not statistics"),
                },
            )
        },
    )  # fmt: skip
    (tmp_path / "fid.json").write_text(json.dumps(found.as_dict()))
    card = model_card(open_weights(run_folder), "someone/my-xar", [read_results(tmp_path / "fid.json")], None)
    assert "| FID | 2.346 ± 0.031 |" in card
    assert "precision" not in card


def test_a_card_claims_no_training_that_the_weights_do_not_tell_of(
    run_folder, bare_file, training_file, golden_config, tmp_path
):
    for name, source, config, ours in (
        ("run", run_folder, None, True),
        ("bare", bare_file, golden_config, False),
        ("training", training_file, golden_config, False),
    ):
        weights, export = open_weights(source, config), tmp_path / f"{name}.safetensors"
        export_weights(weights, export)
        for one in (weights, open_weights(export)):
            card = model_card(one, "someone/xar", [], None)
            assert ("trained with `xar`" in card) == ours
            assert ("not a result of these weights" in card) == ours
            assert "by their authors" not in card


@pytest.mark.parametrize(("classes", "words", "option"), [(7, "7 classes", " --class 0 "), (0, "no classes", None)])
def test_a_card_advises_a_class_where_there_are_classes(run_folder, classes, words, option):
    weights = open_weights(run_folder)
    config = weights.config.model_copy(update={"data": weights.config.data.model_copy(update={"num_classes": classes})})
    card = model_card(replace(weights, config=config), "someone/xar", [], None)
    assert words in card
    assert option in card if option else "--class" not in card


def test_a_card_without_results_says_so_and_claims_no_licence(run_folder):
    card = model_card(open_weights(run_folder), "someone/my-xar", [], None)
    assert "Not measured yet." in card
    assert "license:" not in card


def test_folder_to_push(run_folder, tmp_path):
    out = tmp_path / "push"
    out.mkdir()
    write_model_folder(open_weights(run_folder), "someone/my-xar", [], None, out)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.safetensors", "recipe.yaml"]
    assert open_weights(out / "model.safetensors").step == 1234


@pytest.mark.parametrize("missing", ["samples", "reference", "protocols"])
def test_results_without_their_protocol_are_refused(tmp_path, missing):
    (tmp_path / "fid.json").write_text(json.dumps({key: value for key, value in RESULT.items() if key != missing}))
    with pytest.raises(UserError, match=missing) as error:
        read_results(tmp_path / "fid.json")
    assert "xar fid --json" in error.value.next_step


def changed(where, value):
    """The results with one value replaced."""
    result = json.loads(json.dumps(RESULT))
    *path, last = where
    holder = result
    for key in path:
        holder = holder[key]
    holder[last] = value
    return result


@pytest.mark.parametrize("value", ["", "ab", None])
def test_a_reference_without_a_hash_is_none(tmp_path, value):
    (tmp_path / "fid.json").write_text(json.dumps(changed(("reference", "sha256"), value)))
    with pytest.raises(UserError, match="Cannot read the results"):
        read_results(tmp_path / "fid.json")


def test_numbers_that_are_none_are_no_results(tmp_path, run_folder):
    (tmp_path / "fid.json").write_text(json.dumps(changed(("samples", "count"), float("inf"))))
    with pytest.raises(UserError, match="Cannot read the results"):
        read_results(tmp_path / "fid.json")
    result = changed(("protocols", "adm", "metrics", "fid", "value"), float("nan"))
    assert "| FID |" not in model_card(open_weights(run_folder), "someone/my-xar", [result], None)


@pytest.mark.parametrize("content", ["not json", "[1]", "1"])
def test_files_that_are_no_results_are_refused(tmp_path, content):
    (tmp_path / "fid.json").write_text(content)
    with pytest.raises(UserError, match="Cannot read the results"):
        read_results(tmp_path / "fid.json")
