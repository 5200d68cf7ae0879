"""Which folders of samples may be completed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.samples import small_config
from xar_cli.config import load_recipe
from xar_cli.config.recipes import override
from xar_cli.config.schema import Config
from xar_cli.sample.manifest import LATER_KEYS, differences, make_manifest
from xar_cli.sample.settings import SampleSettings

KL16 = "kl16:abc"


def manifest(config: Config, tokenizer: str, *overrides: str) -> dict:
    settings = SampleSettings(
        config=override(config, overrides), weights="w", out=Path("s"), count=4, classes=tuple(range(10))
    )
    return make_manifest(settings, "0" * 64, tokenizer)


@pytest.fixture(scope="module")
def base() -> Config:
    return load_recipe("base")


@pytest.mark.parametrize(
    ("tokenizer", "overrides", "words"),
    [
        ("kl16:def", [], "tokenizer: kl16:abc there, kl16:def here"),
        (KL16, ["tokenizer.latent_scale=0.5"], "latent_scale: 0.2325 there, 0.5 here"),
        (KL16, ["sample.decoder_precision=bf16"], "decoder_precision: fp32 there, bf16 here"),
        (KL16, ["entity.size=4"], "entity: {'kind': 'cell', 'size': 8"),
    ],
)
def test_what_changes_pixels_is_a_difference(base, tokenizer, overrides, words):
    there, here = manifest(base, KL16), manifest(base, tokenizer, *overrides)
    found = differences(there, here)
    assert any(text.startswith(words) for text in found), found
    older = {key: value for key, value in there.items() if key not in LATER_KEYS}
    assert not [text for text in differences(older, here) if text.split(":")[0] in LATER_KEYS]


def test_a_folder_of_an_older_version_is_completed(base):
    here = manifest(base, KL16)
    assert set(LATER_KEYS) <= here.keys()
    assert differences({key: value for key, value in here.items() if key not in LATER_KEYS}, here) == []


def test_pixels_have_no_precision_of_a_decoder():
    config = small_config()
    there, here = manifest(config, "pixels/p2"), manifest(config, "pixels/p2", "sample.decoder_precision=bf16")
    assert differences(there, here) == []
    assert differences(there, manifest(config, "pixels/p2", "sample.batch_size=3", "sample.compile=false")) == []


def test_it_counts_what_one_image_costs(base):
    """Three passes over finished entities, six where the null class runs too."""
    unguided = load_recipe("tiny", ["sample.num_steps=10", "sample.guidance_scale=1.0"])
    assert manifest(unguided, "pixels/p2")["evaluations"] == {
        "entities": 4, "conditional": 40, "null": 0, "commits": 3, "total_per_image": 43,
    }  # fmt: skip
    assert manifest(base, KL16)["evaluations"]["total_per_image"] == 4 * 40 + 3 * 40 + 6
    older = {key: value for key, value in manifest(base, KL16).items() if key != "evaluations"}
    assert differences(older, manifest(base, KL16)) == []
