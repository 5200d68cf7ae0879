"""The model card says what the model is, and no number without its protocol."""

from __future__ import annotations

import json

import pytest

from xar_cli.errors import UserError
from xar_cli.weights import open_weights
from xar_cli.weights.card import model_card, read_results, write_model_folder


def test_card_of_a_run(run_folder):
    results = [{"protocol": "adm", "reference": "VIRTUAL_imagenet256", "count": 50000, "fid": 2.345, "ok": True}]
    card = model_card(open_weights(run_folder), "someone/my-xar", results, "mit")
    assert "license: mit" in card
    assert "hf://someone/my-xar/model.safetensors" in card
    assert "--tokenizer-weights kl16.ckpt" in card
    assert "step 1234" in card
    assert "entity cell, 8" in card
    assert "| fid | 2.345 | adm | 50000 | VIRTUAL_imagenet256 |" in card
    assert "| ok |" not in card
    assert "not a result of these weights" in card


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


@pytest.mark.parametrize("content", ["not json", "[1]", '{"fid": 1.0, "protocol": "adm"}'])
def test_results_without_their_protocol_are_refused(tmp_path, content):
    (tmp_path / "fid.json").write_text(content)
    with pytest.raises(UserError, match="xar fid --json"):
        read_results(tmp_path / "fid.json")


def test_results_are_read(tmp_path):
    result = {"protocol": "adm", "reference": "r", "count": 10, "metrics": {"fid": 1.0}}
    (tmp_path / "fid.json").write_text(json.dumps(result))
    assert read_results(tmp_path / "fid.json") == result
