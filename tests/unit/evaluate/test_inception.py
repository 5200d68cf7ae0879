"""Our Inception features against torch-fidelity's and clean-fid's own, with seeded random weights in their formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tests.unit.evaluate.conftest import make_images, write_folder
from xar_cli.errors import UserError
from xar_cli.evaluate import Settings, evaluate
from xar_cli.evaluate.inception import resize_like_clean_fid, resize_like_tensorflow
from xar_cli.evaluate.metrics import inception_score, kid_clean_fid, torch_fidelity_splits
from xar_cli.evaluate.networks import CleanFidInception, TorchFidelityInception
from xar_cli.evaluate.weights import Weights

CPU = torch.device("cpu")


def weights(path) -> Weights:
    return Weights(path, "random", False)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_features_equal_torch_fidelity(inception_files) -> None:
    images = make_images(3)
    theirs_net = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_files.torch_fidelity))
    seen: list[torch.Tensor] = []
    theirs_net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    pool, logits = theirs_net(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = TorchFidelityInception(weights(inception_files.torch_fidelity), CPU, "fp32", compiled=False).features(images)
    assert relative(ours["pool"], pool.numpy()) < 1e-4
    assert relative(ours["logits"], logits.numpy()) < 1e-4
    # sFID: the first 7 channels of that branch, on a 17 x 17 grid, flattened as N, H, W, C.
    spatial = seen[0].numpy()
    assert spatial.shape == (3, 192, 17, 17)
    assert ours["spatial"].shape == (3, 2023)
    assert relative(ours["spatial"].reshape(3, 17, 17, 7), spatial[:, :7].transpose(0, 2, 3, 1)) < 1e-4
    # A flattening in the wrong order would not pass for it.
    assert relative(ours["spatial"].reshape(3, 7, 17, 17), spatial[:, :7]) > 0.1


def test_features_equal_clean_fid(inception_files, tmp_path) -> None:
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    images = make_images(3, size=48)
    folder = write_folder(tmp_path / "images", images)
    theirs_net = InceptionV3W(str(inception_files.clean.parent), download=False)
    theirs = get_folder_features(str(folder), theirs_net, num_workers=0, device=CPU, mode="clean", verbose=False)
    network = CleanFidInception(weights(inception_files.clean), CPU, "fp32")
    ours = network.features(np.stack([network.prepare(image) for image in images]))["pool"]
    assert relative(ours, theirs) < 1e-4


def test_without_a_compiler_the_plain_network_is_used(inception_files, monkeypatch, caplog) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def broken(images: torch.Tensor) -> None:
        raise TorchDynamoException("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda net, **_: broken)
    monkeypatch.setattr("xar_cli.logs.log.propagate", True)
    network = TorchFidelityInception(weights(inception_files.torch_fidelity), CPU, "fp32", compiled=True)
    plain = TorchFidelityInception(weights(inception_files.torch_fidelity), CPU, "fp32", compiled=False)
    images = make_images(1)
    np.testing.assert_array_equal(network.features(images)["pool"], plain.features(images)["pool"])
    assert "no working C++ compiler" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_compiled_features_are_equal_and_weights_stay_in_the_order_of_the_convolution(inception_files) -> None:
    plain = TorchFidelityInception(weights(inception_files.torch_fidelity), CPU, "fp32", compiled=False)
    compiled = TorchFidelityInception(weights(inception_files.torch_fidelity), CPU, "fp32", compiled=True)
    images = make_images(2)
    assert relative(compiled.features(images)["pool"], plain.features(images)["pool"]) < 1e-4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled.features(images)
    kernels = {event.key for event in profile.key_averages()}
    assert "mkldnn::_convolution_pointwise" in kernels
    assert "aten::mkldnn_convolution" not in kernels  # which puts the weight in order at every call


def test_the_two_resizes_differ() -> None:
    """Shrinking is where: TensorFlow 1's bilinear does not smooth, clean-fid's does. So their numbers do not mix."""
    image = np.zeros((1024, 1024, 3), np.uint8)
    image[::2] = 255  # stripes of one pixel: grey when smoothed
    clean = resize_like_clean_fid(image)
    tensorflow = (resize_like_tensorflow(torch.from_numpy(image[None]).permute(0, 3, 1, 2)) * 128 + 128)[0]
    assert np.abs(clean[20:-20] - 127.5).max() < 30
    assert (tensorflow - 127.5).abs().max() > 120


def test_resize_equals_clean_fids_own() -> None:
    from cleanfid.resize import build_resizer

    image = make_images(1, size=64)[0]
    np.testing.assert_array_equal(resize_like_clean_fid(image), build_resizer("clean")(image))


def test_weights_of_another_network_are_refused(tmp_path, inception_files) -> None:
    other = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(3)}, other)
    with pytest.raises(UserError, match="does not hold the weights"):
        TorchFidelityInception(weights(other), CPU, "fp32", compiled=False)
    with pytest.raises(UserError, match="does not hold clean-fid's Inception"):
        CleanFidInception(weights(inception_files.torch_fidelity), CPU, "fp32")


def test_a_pickle_that_runs_code_is_refused(tmp_path) -> None:
    """torch-fidelity unpickles freely; we do not."""
    import os
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    bomb = tmp_path / "bomb.pth"
    bomb.write_bytes(pickle.dumps({"fc.bias": Bomb()}))
    with pytest.raises(UserError, match="cannot be read as a state dict"):
        TorchFidelityInception(weights(bomb), CPU, "fp32", compiled=False)
    assert not (tmp_path / "ran").exists()


def test_torch_fidelitys_float64_is_float32(inception_files) -> None:
    """The trap: its option is accepted and does nothing. We offer no such option, and sum in float64 ourselves."""
    from torch_fidelity.helpers import text_to_dtype

    assert text_to_dtype("float64") is torch.float32
    assert "float64" not in Settings.model_fields["precision"].annotation.__args__


@pytest.mark.slow
def test_numbers_equal_both_libraries_own_commands(inception_files, tmp_path) -> None:
    """End to end on the same files: torch-fidelity's `calculate_metrics`, clean-fid's features, one pass of ours."""
    from cleanfid.fid import fid_from_feats, get_folder_features, kernel_distance
    from cleanfid.inception_torchscript import InceptionV3W

    samples = write_folder(tmp_path / "samples", make_images(14))
    reference = write_folder(tmp_path / "reference", make_images(18, seed=1, brightness=0.8))
    settings = Settings(
        inception_weights=(inception_files.torch_fidelity, inception_files.clean), error_bars="none", batch_size=8
    )
    ours = evaluate(samples, reference, ["adm", "torch-fidelity", "clean-fid"], settings=settings)
    assert set(ours.tables) == {"inception", "inception-clean"}  # adm and torch-fidelity share theirs

    theirs = calculate_metrics(
        input1=str(samples), input2=str(reference), cuda=False, fid=True, isc=True, kid=True, prc=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_files.torch_fidelity),
        kid_subset_size=14, batch_size=8, verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    adm, fidelity = ours.results["adm"].metrics, ours.results["torch-fidelity"].metrics
    assert adm["fid"].value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert fidelity["fid"].value == adm["fid"].value
    assert fidelity["is"].value == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert fidelity["kid"].value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert adm["precision"].value == pytest.approx(theirs["precision"], abs=1e-6)
    assert adm["recall"].value == pytest.approx(theirs["recall"], abs=1e-6)
    assert fidelity["precision"].value is None  # its default is VGG16, whose weights were not given
    logits = ours.tables["inception"].layers["logits"]
    assert inception_score(logits, torch_fidelity_splits(14)).value == fidelity["is"].value

    net = InceptionV3W(str(inception_files.clean.parent), download=False)
    feats = [
        get_folder_features(str(folder), net, num_workers=0, device=CPU, mode="clean", verbose=False)
        for folder in (samples, reference)
    ]
    clean = ours.results["clean-fid"].metrics
    try:
        expected = fid_from_feats(*feats)
    except TypeError:  # scipy 1.18 dropped sqrtm(disp=...), which clean-fid calls
        expected = None
    if expected is not None:
        assert clean["fid"].value == pytest.approx(expected, rel=1e-4)
    np.random.seed(0)
    assert clean["kid"].value == pytest.approx(kernel_distance(*feats), rel=1e-4)
    assert kid_clean_fid(*feats)[0].value == pytest.approx(clean["kid"].value, rel=1e-4)
    assert clean["fid"].value != pytest.approx(adm["fid"].value, rel=1e-3)  # another resize, another number


@pytest.mark.slow
def test_bf16_is_near_and_says_so(inception_files) -> None:
    images = make_images(4)
    file = weights(inception_files.torch_fidelity)
    full = TorchFidelityInception(file, CPU, "fp32", compiled=False)
    half = TorchFidelityInception(file, CPU, "bf16", compiled=False)
    difference = relative(half.features(images)["pool"], full.features(images)["pool"])
    assert 1e-6 < difference < 0.05
    assert full.identity != half.identity  # so they never share a cache entry


@pytest.mark.slow
def test_precision_and_recall_equal_torch_fidelitys_default(inception_files, tmp_path) -> None:
    """Without a word about the network it takes VGG16; with those weights so do we, beside FID on Inception."""
    import torchvision

    torch.manual_seed(0)
    file = tmp_path / "vgg16.pth"
    torch.save(torchvision.models.vgg16().state_dict(), file)
    samples = write_folder(tmp_path / "samples", make_images(7))
    reference = write_folder(tmp_path / "reference", make_images(11, seed=1, brightness=0.8))
    theirs = calculate_metrics(
        input1=str(samples), input2=str(reference), cuda=False, prc=True, feature_extractor_weights_path=str(file),
        verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    settings = Settings(
        inception_weights=(inception_files.torch_fidelity,), vgg16_weights=file, error_bars="none", batch_size=8
    )
    ours = evaluate(samples, reference, "torch-fidelity", settings=settings).first.metrics
    assert ours["precision"].value == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"].value == pytest.approx(theirs["recall"], abs=1e-6)
    assert "vgg16 features" in ours["precision"].note
    assert ours["precision"].value != ours["recall"].value
