"""Every kind of entity in every context trains, resumes bit for bit and samples through the same code."""

from __future__ import annotations

import pytest
import torch

from tests.caches import make_cache
from tests.runs import final_tensors, losses, settings, small_recipe, train_until
from xar_cli.sample.images import image_path, is_whole
from xar_cli.sample.stage import SampleSettings, sample
from xar_cli.train.loop import train

ENTITIES = (
    "{kind: cell, size: 4}",
    "{kind: cell, size: [2, 8], order: centre_out}",
    "{kind: subsample, stride: 2}",
    "{kind: scale, sizes: [1, 2, 4, 8]}",
    "{kind: token}",
    "{kind: image}",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "latents.h5")


def draw(config, run, out):
    sample(SampleSettings(config=config, weights=str(run), out=out, count=2, classes=(0, 1), device="cpu"))
    assert all(is_whole(image_path(out, index)) for index in range(2))


@pytest.mark.parametrize("context", ["random", "increasing", "decreasing", "clean"])
@pytest.mark.parametrize("entity", ENTITIES)
def test_train_resume_sample(data, tmp_path, monkeypatch, entity, context):
    config = small_recipe(f"entity={entity}", f"train.context={context}", "train.epochs=1", "train.checkpoint_every=2")
    train(settings(config, data, tmp_path / "whole"))
    train_until(monkeypatch, 3, config, data, tmp_path / "run")
    train(settings(config, data, tmp_path / "run"))
    expected, found = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    draw(config, tmp_path / "run", tmp_path / "samples")
