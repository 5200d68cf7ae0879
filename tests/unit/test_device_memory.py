"""Out of memory is a sentence with a next step in every stage; any other error stays what it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.caches import make_cache, make_images, pixel_recipe
from tests.runs import settings, small_recipe
from tests.samples import refused, sample, small_weights
from xar_cli.cache import cache_latents
from xar_cli.cache.jobs import EncodeImages
from xar_cli.cli.app import main
from xar_cli.device_memory import memory_for
from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.evaluate import evaluation, features
from xar_cli.evaluate.images import FolderImages
from xar_cli.evaluate.networks import DigitNetwork
from xar_cli.sample import stage
from xar_cli.train.loop import train

OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
)


def full(*_, **__):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_want_of_memory_is_a_sentence(error):
    sentence = "Drawing 3 images does not fit into the device's memory"
    with pytest.raises(UserError, match=sentence) as caught, memory_for("Drawing 3 images", "Draw 2."):
        raise error
    assert (caught.value.next_step, caught.value.exit_code) == ("Draw 2.", 1)


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), MemoryError(), KeyError("memory")])
def test_another_error_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught, memory_for("Drawing 3 images", "Draw 2."):
        raise error
    assert caught.value is error


@pytest.fixture
def told(monkeypatch):
    """What this rank tells the others: an error that is not among it leaves them waiting."""
    values = []

    def gather(self, value):
        values.append(value)
        return [value]

    monkeypatch.setattr(Ranks, "gather", gather)
    return values


def test_sampling(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "sample_latents", full)
    weights = small_weights(tmp_path)
    said = refused(capsys, *weights, "--count", 10, "--out", tmp_path / "out", code=1)
    assert "Drawing 7 images at a time does not fit into the device's memory. next: Lower --batch-size" in said
    said = refused(capsys, *weights, "--explain", tmp_path / "picture.png", code=1)
    assert (
        "Drawing an image does not fit into the device's memory. next: Draw on a larger device, or with --set" in said
    )


def test_a_network_that_does_not_fit_to_sample_from(tmp_path, monkeypatch, capsys):
    """The next step that is given can be taken, into the same folder."""
    weights, out = small_weights(tmp_path), ["--count", 10, "--out", tmp_path / "out"]
    sentence = "The network does not fit into the device's memory. next: Draw on a larger device"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "ready_network", full)
        assert f"{sentence}, or with --set train.precision=bf16." in refused(capsys, *weights, *out, code=1)
        said = refused(capsys, *weights, *out, "--set", "train.precision=bf16", code=1)
        assert said.endswith(f"{sentence}.")
        assert sentence in refused(capsys, *weights, "--explain", tmp_path / "picture.png", code=1)
    assert sample(capsys, *weights, *out, "--set", "train.precision=bf16")["made"] == 10


def test_a_network_that_does_not_fit_to_evaluate_a_run(tmp_path, monkeypatch, capsys):
    run, real = tmp_path / "run", make_images(tmp_path / "real")
    train(settings(small_recipe("train.epochs=0.2"), make_cache(tmp_path / "latents.h5"), run))
    monkeypatch.setattr(stage, "ready_network", full)
    with pytest.raises(SystemExit) as caught:
        main(["fid", "--run", str(run), "--reference", str(real), "--protocol", "digits", "--count", "12"])
    assert caught.value.code == 1
    assert "The network does not fit into the device's memory" in " ".join(capsys.readouterr().err.split())


def test_caching_keeps_what_was_made(tmp_path, monkeypatch):
    images, out, calls = make_images(tmp_path / "images", 3, 9), tmp_path / "latents.h5", []

    def encode(self, items, real=EncodeImages.encode):
        calls.append(len(items))
        return full() if len(calls) == 3 else real(self, items)

    recipe = pixel_recipe("data.num_classes=3")
    with monkeypatch.context() as patch:
        patch.setattr(EncodeImages, "encode", encode)
        with pytest.raises(UserError, match="Encoding 4 images at a time does not fit") as caught:
            cache_latents(images, out, recipe, device="cpu", batch_size=4)
    assert "Lower --batch-size" in caught.value.next_step
    assert cache_latents(images, out, recipe, device="cpu", batch_size=2).num_encoded == 27 - 2 * 4


def test_building_a_feature_network(tmp_path, monkeypatch, told):
    monkeypatch.setattr(evaluation, "build_network", full)
    images = make_images(tmp_path / "images")
    with pytest.raises(UserError, match="The network 'digits' does not fit into the device's memory") as caught:
        evaluation.evaluate(images, images, "digits")
    assert caught.value in told


def test_features_of_one_rank_are_missed_by_all(tmp_path, monkeypatch, told):
    """The error is exchanged like that of a bad image: no rank waits for one that has ended."""
    images, network = FolderImages(make_images(tmp_path / "images")), DigitNetwork(torch.device("cpu"))
    monkeypatch.setattr(network, "features", full)
    with pytest.raises(UserError, match="The network 'digits' on 8 images at a time does not fit"):
        features.extract(
            images, network, Ranks(0, 0, 1, torch.device("cpu")), indices=np.arange(27), content_hash="", batch_size=8
        )
    assert any(isinstance(getattr(value, "error", None), UserError) for value in told)
