"""The digits protocol: the shipped classifier, its yardsticks, and agreement with torch-fidelity's own command."""

from __future__ import annotations

import json
import shutil
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch_fidelity import calculate_metrics

from xar_cli.data.digits import split_digits
from xar_cli.errors import UserError
from xar_cli.evaluate import Settings, evaluate
from xar_cli.evaluate.digits import EXTRACTOR_NAME, DigitFeatures, DigitNet, weights_bytes
from xar_cli.evaluate.images import ArrayImages
from xar_cli.evaluate.metrics import kid_torch_fidelity

QUICK = Settings(error_bars="none")


def as_set(images: np.ndarray, labels: np.ndarray | None = None) -> ArrayImages:
    return ArrayImages(images, "digits in memory", labels)


def test_the_file_is_small_and_states_its_accuracy() -> None:
    assert len(weights_bytes()) <= 200_000
    with safe_open(str(resources.files("xar_cli.evaluate") / "digit_classifier.safetensors"), "pt") as file:
        stated = float(file.metadata()["heldout_accuracy"])
    _, heldout = split_digits()
    net = DigitNet()
    from safetensors.torch import load

    net.load_state_dict(load(weights_bytes()))
    logits = net.eval()(torch.from_numpy(heldout.images)[:, None].float() / 127.5 - 1)[1]
    measured = (logits.argmax(1).numpy() == heldout.labels).mean()
    assert measured == pytest.approx(stated, abs=1e-4)
    assert measured >= 0.98


def test_floor_is_small_and_noise_is_far_away() -> None:
    train, heldout = split_digits()
    reference = as_set(train.images)
    floor = evaluate(as_set(heldout.images, heldout.labels), reference, "digits", settings=QUICK)
    assert floor.frechet_distance == pytest.approx(0.7746, abs=0.01)
    assert floor.class_accuracy is not None
    assert floor.class_accuracy >= 0.98
    noise = np.random.default_rng(0).integers(0, 256, (297, 8, 8), dtype=np.uint8)
    far = evaluate(as_set(noise), reference, "digits", settings=QUICK)
    assert far.frechet_distance > 100 * floor.frechet_distance
    assert far.class_accuracy is None  # no labels
    one_class = evaluate(as_set(heldout.images[heldout.labels == 3]), reference, "digits", settings=QUICK)
    assert one_class.frechet_distance > 100 * floor.frechet_distance


def test_accuracy_goes_by_the_number_that_a_folder_is_named_by(tmp_path, digit_folders) -> None:
    for digit in ("3", "7"):
        shutil.copytree(digit_folders[1] / digit, tmp_path / "some" / digit)
    found = evaluate(tmp_path / "some", digit_folders[0], "digits", settings=QUICK)
    assert found.class_accuracy is not None
    assert found.class_accuracy > 0.95
    assert {name: row["accuracy"] > 0.95 for name, row in found.first.per_class.items()} == {"3": True, "7": True}


@pytest.mark.parametrize("name", ["seven", "10"])
def test_folders_that_are_named_by_no_digit_have_no_accuracy(tmp_path, digit_folders, name: str) -> None:
    shutil.copytree(digit_folders[1] / "3", tmp_path / "some" / "3")
    shutil.copytree(digit_folders[1] / "7", tmp_path / "some" / name)
    found = evaluate(tmp_path / "some", digit_folders[0], "digits", settings=QUICK)
    assert found.class_accuracy is None
    assert found.first.metrics["class_accuracy"].note == "class or folder names are no digits"
    assert found.first.per_class == {}


def test_equals_torch_fidelitys_own_command(tmp_path) -> None:
    """FID, IS, KID, precision and recall of its `calculate_metrics` with the registered extractor, same files."""
    train, heldout = split_digits()
    noisy = (heldout.images[:60] * 0.8 + np.random.default_rng(0).integers(0, 50, (60, 8, 8))).astype(np.uint8)
    for folder, images in (("a", noisy), ("b", train.images[:90])):
        (tmp_path / folder).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / folder / f"{index:06d}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "a"), input2=str(tmp_path / "b"), feature_extractor=EXTRACTOR_NAME, fid=True, isc=True,
        kid=True, prc=True, kid_subset_size=60, cuda=False, verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    ours = evaluate(tmp_path / "a", tmp_path / "b", "digits", settings=QUICK)
    metrics = ours.first.metrics
    assert metrics["fid"].value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert metrics["precision"].value == pytest.approx(theirs["precision"], rel=1e-6)
    assert metrics["recall"].value == pytest.approx(theirs["recall"], rel=1e-6)
    assert metrics["precision"].value != pytest.approx(metrics["recall"].value, rel=0.05)  # so a swap would show
    tables = ours.tables["digits"], ours.reference_tables["digits"]
    kid, _ = kid_torch_fidelity(tables[0].layers["pool"], tables[1].layers["pool"])
    assert kid.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    from xar_cli.evaluate.metrics import inception_score, torch_fidelity_splits

    score = inception_score(tables[0].layers["logits"], torch_fidelity_splits(60))
    assert score.value == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert score.error == pytest.approx(theirs["inception_score_std"], rel=1e-4)


def test_rgb_counts_as_its_grey() -> None:
    extractor = DigitFeatures(EXTRACTOR_NAME, ["32"])
    grey = torch.from_numpy(split_digits()[1].images[:4])[:, None]
    torch.testing.assert_close(extractor(grey)[0], extractor(grey.expand(-1, 3, -1, -1))[0])


def test_other_sizes_are_refused(tmp_path) -> None:
    big = as_set(np.zeros((3, 16, 16), np.uint8))
    with pytest.raises(UserError, match="16 x 16 pixels where 8 x 8"):
        evaluate(big, as_set(split_digits()[0].images), "digits", settings=QUICK)


def test_class_accuracy_from_a_manifest(tmp_path, digit_folders) -> None:
    _, heldout = split_digits()
    for index, image in enumerate(heldout.images[:20]):
        Image.fromarray(image).save(tmp_path / f"{index:06d}.png")
    labels = heldout.labels[:20].copy()
    labels[:5] = (labels[:5] + 1) % 10  # asked for something else: five count as wrong
    names = [f"{digit:02}" for digit in range(10)]
    manifest = {"format": "xar-samples", "version": 1, "labels": labels.tolist(), "class_names": names}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = evaluate(tmp_path, digit_folders[0], "digits", settings=QUICK)
    assert found.class_accuracy == pytest.approx(15 / 20)
    assert set(found.first.per_class) <= set(names)
    assert sum(part["count"] for part in found.first.per_class.values()) == 20


def test_class_accuracy_from_subfolders(digit_folders) -> None:
    found = evaluate(digit_folders[1], digit_folders[0], "digits", settings=QUICK)
    assert found.class_accuracy is not None
    assert found.class_accuracy >= 0.98
    assert found.first.metrics["fid"].name == "Frechet distance (297 images)"
