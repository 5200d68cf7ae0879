"""References: statistics written, read back, and refused where they do not belong."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from tests.unit.evaluate.conftest import FakeInception, make_images, write_folder
from tests.unit.evaluate.test_frechet import features, gaussian
from xar_cli.errors import UserError
from xar_cli.evaluate.reference import open_reference, write_statistics

NETWORK = FakeInception()


def written(path, **origin):
    rows = features(40, 12)
    write_statistics(path, {"pool": gaussian(rows)}, {"network": "inception", "weights_sha256": "fake", **origin})
    return rows


def test_statistics_come_back_with_adms_names(tmp_path) -> None:
    rows = written(tmp_path / "ref.npz", count=40)
    with np.load(tmp_path / "ref.npz") as arrays:
        assert {"mu", "sigma"} <= set(arrays.files)
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    reference = open_reference(tmp_path / "ref.npz")
    found = reference.gaussian(NETWORK, "pool")
    assert found is not None
    np.testing.assert_allclose(found.mu, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.sigma, np.cov(rows, rowvar=False), atol=1e-12)
    assert reference.origin["count"] == 40


def test_foreign_statistics_of_mixed_types_are_taken_as_float64(tmp_path) -> None:
    """adm_in256_stats.npz holds float32 beside float64; torch-fidelity's own function refuses that."""
    rows = features(40, 12)
    np.savez(tmp_path / "foreign.npz", mu=rows.mean(0).astype(np.float32), sigma=np.cov(rows, rowvar=False))
    found = open_reference(tmp_path / "foreign.npz").gaussian(NETWORK, "pool")
    assert found is not None
    assert found.mu.dtype == found.sigma.dtype == np.float64


def test_adm_batch_gives_statistics_and_images(tmp_path) -> None:
    images, rows = make_images(6), features(40, 12)
    np.savez(tmp_path / "virtual.npz", arr_0=images, mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    reference = open_reference(tmp_path / "virtual.npz")
    assert reference.images is not None
    assert len(reference.images) == 6
    assert reference.gaussian(NETWORK, "pool") is not None
    assert reference.gaussian(NETWORK, "spatial") is None  # computed from the images then
    assert reference.gaussian(FakeInception("inception-clean"), "pool") is None  # ADM's statistics are not clean-fid's


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.zeros(11)}, "do not belong together"),
        ({"mu": np.zeros((12, 1))}, "do not belong together"),
        ({"sigma": np.full((12, 12), np.nan)}, "not finite"),
        ({"mu": np.full(12, np.inf)}, "not finite"),
        ({"sigma": np.triu(np.ones((12, 12)))}, "not symmetric"),
        ({"sigma": np.diag([-1e-3, *np.ones(11)])}, "a variance is negative"),  # too little for the next one
        ({"sigma": np.eye(12) + 1.05 * np.eye(12)[::-1]}, "negative eigenvalues"),
        ({"mu": np.zeros(12, int)}, "no floating-point"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "do not belong together"),
        ({"xar": np.array('{"network": ')}, "no JSON object"),
        ({"xar": np.array("[1, 2]")}, "no JSON object"),
        ({"xar": np.array('{"format": "xar-statistics", "version": 2}')}, "version 2; read are"),
        ({"xar": np.array('{"format": "other", "version": 1}')}, "of format 'other'"),
        ({"xar": np.array("{}")}, "of format None"),
    ],
)
def test_wrong_statistics_are_refused(tmp_path, change, message: str) -> None:
    np.savez(tmp_path / "ref.npz", **{"mu": np.zeros(12), "sigma": np.eye(12), **change})
    with pytest.raises(UserError, match=message):
        open_reference(tmp_path / "ref.npz")


@pytest.mark.parametrize(
    "about",
    [
        *({"count": count} for count in ("many", True)),
        *({"image_size": size} for size in ([32], ["a", "b"], 8)),
        {"weights_sha256": 7},
        {"network": None},
    ],
    ids=str,
)
def test_statistics_whose_own_description_is_damaged_are_refused(tmp_path, about) -> None:
    about = json.dumps({"format": "xar-statistics", "version": 1, **about})
    np.savez(tmp_path / "ref.npz", mu=np.zeros(12), sigma=np.eye(12), xar=np.array(about))
    with pytest.raises(UserError, match=f"damaged: '{list(json.loads(about))[2]}'"):
        open_reference(tmp_path / "ref.npz")


@pytest.mark.parametrize("dtype", [np.longdouble, np.float64, np.float32, np.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_covariance_without_full_rank_is_one(tmp_path, dtype, scale) -> None:
    sigma = np.cov(scale * features(5, 40), rowvar=False).astype(dtype)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(40), sigma=sigma)
    assert "pool" in open_reference(tmp_path / "ref.npz").statistics


def test_an_npz_with_neither_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "ref.npz", something=np.zeros(3))
    with pytest.raises(UserError, match="neither images"):
        open_reference(tmp_path / "ref.npz")


def test_statistics_of_another_dimension_network_or_weights_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "small.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(UserError, match="7 dimensions where the network gives 12"):
        open_reference(tmp_path / "small.npz").gaussian(NETWORK, "pool")
    written(tmp_path / "ref.npz")
    with pytest.raises(UserError, match="not of 'inception-clean'"):
        open_reference(tmp_path / "ref.npz").gaussian(FakeInception("inception-clean"), "pool")
    with pytest.raises(UserError, match="other weights"):
        open_reference(tmp_path / "ref.npz").gaussian(FakeInception(sha256="another"), "pool")


def test_samples_given_as_reference_are_noticed(tmp_path) -> None:
    folder = write_folder(tmp_path / "samples", make_images(3))
    (folder / "manifest.json").write_text(json.dumps({"format": "xar-samples", "labels": [0, 1, 2]}))
    with pytest.raises(UserError, match="given as the reference") as caught:
        open_reference(folder)
    assert "--samples" in caught.value.next_step


def test_packed_samples_given_as_reference_are_noticed(tmp_path) -> None:
    manifest = {"format": "xar-samples", "labels": [0, 1, 2]}
    with h5py.File(tmp_path / "samples.h5", "w") as file:
        file["images"], file.attrs["manifest"] = make_images(3), json.dumps(manifest)
    np.savez(tmp_path / "samples.npz", make_images(3), np.arange(3))
    assert open_reference(tmp_path / "samples.npz").images is not None  # nothing says that it was generated
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name in ("samples.h5", "samples.npz"):
        with pytest.raises(UserError, match=f"{name}' was given as the reference"):
            open_reference(tmp_path / name)


@pytest.mark.parametrize("labels", [{}, {"arr_1": np.arange(3)}])
@pytest.mark.parametrize("content", [b"files: 1", b"[1, 2]", b"\x80"])
def test_a_manifest_of_another_program_beside_it_is_nothing_to_a_batch(tmp_path, labels, content) -> None:
    np.savez(tmp_path / "virtual.npz", arr_0=make_images(3), mu=np.zeros(3), sigma=np.eye(3), **labels)
    (tmp_path / "manifest.json").write_bytes(content)
    assert open_reference(tmp_path / "virtual.npz").images is not None
