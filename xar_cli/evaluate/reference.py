"""What samples are compared with: real images, statistics of them, or both in one ADM batch.

Owns the statistics file that `xar fid stats` writes and the checks that a foreign one has to pass.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xar_cli.config.schema import Sides
from xar_cli.data.images import printable
from xar_cli.errors import UserError
from xar_cli.evaluate.frechet import Gaussian
from xar_cli.evaluate.images import ArrayImages, ImageSet, open_images, require_size
from xar_cli.evaluate.manifest import is_size, manifest_of_npz
from xar_cli.evaluate.networks import INCEPTION, FeatureNetwork
from xar_cli.evaluate.npz import IMAGES, read_npz
from xar_cli.hub import sha256_of
from xar_cli.run_dir import is_file, is_there, write_atomic

STATISTICS_FORMAT = "xar-statistics"
STATISTICS_VERSION = 1
SUFFIX_OF_LAYER = {
    "pool": "",
    "spatial": "_s",
}  # ADM's names: mu, sigma of the pool, mu_s, sigma_s of the spatial layer
SYMMETRY_TOLERANCE = 1e-5
NEGATIVE_TOLERANCE = 1e-2  # of the largest variance; at 1024 dimensions float32 left 4e-5 below zero, float16 7e-4
MAKE_AGAIN = "Make or fetch them again."


@dataclass
class Reference:
    """Real images, or what is known of them.

    Attributes:
        name: what a person calls it.
        content_hash: sha256 of an .npz file, whatever it holds; "" for other images, which are hashed where their
            features are computed.
        images: the images, where there are any.
        statistics: layer name to Gaussian, where given ready-made.
        network: whose features the statistics are of, where given.
        origin: what the statistics file says of itself; empty for a foreign file.
    """

    name: str
    content_hash: str
    images: ImageSet | None = None
    statistics: Mapping[str, Gaussian] = field(default_factory=dict)
    network: str | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def gaussian(self, network: FeatureNetwork, layer: str) -> Gaussian | None:
        """The ready-made statistics of a layer, or None where they must be computed from images.

        Raises:
            UserError: the statistics do not go with that network, and there are no images to fall back on.
        """
        if not self.statistics:
            return None
        if self.network == network.name and layer in self.statistics:
            self._check_made_with(network)
            found = self.statistics[layer]
            if len(found.mu) != network.layers[layer]:
                raise UserError(
                    f"'{self.name}' holds statistics (mu{SUFFIX_OF_LAYER[layer]}) of {len(found.mu)} dimensions where "
                    f"the network gives {network.layers[layer]}.",
                    "Make them again with `xar fid stats` and the same --protocol.",
                )
            return found
        if self.images is None and layer == "pool":
            raise UserError(
                f"'{self.name}' holds statistics of the network '{self.network}', not of '{network.name}'.",
                "Numbers of one protocol do not go with statistics of another: give a folder of images, or statistics "
                "made with the same --protocol.",
            )
        return None

    def _check_made_with(self, network: FeatureNetwork) -> None:
        made_with = self.origin.get("weights_sha256")
        if made_with not in (None, network.weights_sha256):
            raise UserError(
                f"'{self.name}' was made with other weights ({made_with[:12]}...) than these "
                f"({network.weights_sha256[:12]}...).",
                "Make the statistics again with the weights that judge the samples.",
            )


def open_reference(source: Path | ImageSet | Reference, image_size: Sides | None = None) -> Reference:
    """Open a folder of images, an ADM batch, or a statistics file; one that is open already is returned.

    Raises:
        UserError: none of these; samples given as reference; an array of another size than `image_size`; statistics
            that are not finite, not square, not symmetric or have negative eigenvalues, whose own description is
            damaged or which are of another version.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, Path) and source.suffix == ".npz" and is_file(source):
        return _open_npz(source, image_size)
    images = open_images(source, image_size)
    _require_real(images.name, images.generated or images.manifest is not None)
    return Reference(images.name, "", images)


def _require_real(name: str, generated: bool) -> None:
    if generated:
        raise UserError(
            f"'{name}' was given as the reference, but its manifest says that it holds generated samples.",
            "Give it as --samples, and real images as --reference.",
        )


def require_replaceable(path: Path) -> None:
    """Raise a UserError unless `path` is free, or holds statistics that `write_statistics` wrote and no images."""
    if not is_there(path):
        return
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
    except Exception:  # another program's file: zipfile, zlib, numpy, each has errors of its own
        names = set()
    if "xar" not in names or IMAGES in names:
        raise UserError(
            f"'{path}' is there already, and is no statistics file of `xar fid stats`.",
            "Give another name, or remove it if you do not need it.",
        )


def write_statistics(path: Path, layers: Mapping[str, Gaussian], origin: Mapping[str, Any]) -> None:
    """Write statistics with ADM's names (`mu`, `sigma`, `mu_s`, `sigma_s`) and where they come from.

    Args:
        layers: Gaussian of `pool`, and of `spatial` where the network has it.
        origin: network, weights_sha256, count, content_hash, image_size, source.
    """
    arrays: dict[str, Any] = {
        name + SUFFIX_OF_LAYER[layer]: value
        for layer, gaussian in layers.items()
        for name, value in (("mu", gaussian.mu), ("sigma", gaussian.sigma))
    }
    about = {"format": STATISTICS_FORMAT, "version": STATISTICS_VERSION, **origin}
    buffer = io.BytesIO()
    np.savez(buffer, xar=np.array(json.dumps(about)), **arrays)
    write_atomic(path, buffer.getvalue())


def _open_npz(path: Path, image_size: Sides | None) -> Reference:
    arrays, name = read_npz(path), printable(str(path))
    _require_real(name, manifest_of_npz(path, arrays) is not None)
    images = ArrayImages(arrays[IMAGES], name) if IMAGES in arrays else None
    if images is not None:
        require_size(images, image_size)
    origin = _read_origin(path, arrays["xar"]) if "xar" in arrays else {}
    statistics = {
        layer: _checked_gaussian(path, arrays, suffix)
        for layer, suffix in SUFFIX_OF_LAYER.items()
        if "mu" + suffix in arrays and "sigma" + suffix in arrays
    }
    if images is None and "pool" not in statistics:
        raise UserError(
            f"'{path}' holds neither images (arr_0) nor statistics (mu, sigma).",
            "Give an ADM reference batch, or make statistics with `xar fid stats`.",
        )
    return Reference(name, sha256_of(path), images, statistics, origin.get("network", INCEPTION), origin)


def _read_origin(path: Path, text: np.ndarray) -> Mapping[str, Any]:
    """What `write_statistics` wrote beside them."""
    try:
        origin = json.loads(str(text))
    except ValueError:
        origin = None
    if not isinstance(origin, dict):
        raise UserError(f"'{path}' is damaged: what it says of itself is no JSON object.", MAKE_AGAIN)
    made_as = origin.get("format"), origin.get("version")
    if made_as != (STATISTICS_FORMAT, STATISTICS_VERSION):
        raise UserError(
            f"'{path}' is of format {made_as[0]!r}, version {made_as[1]!r}; read are '{STATISTICS_FORMAT}', version "
            f"{STATISTICS_VERSION}.",
            "Make it again with this version of xar.",
        )
    kinds = {"network": str, "weights_sha256": str, "count": int}
    wrong = [key for key, kind in kinds.items() if type(origin.get(key, kind())) is not kind]
    size = origin.get("image_size")
    if size is not None and not (isinstance(size, list) and is_size(size)):
        wrong.append("image_size")
    if wrong:
        raise UserError(f"'{path}' is damaged: '{wrong[0]}' is not as it was written.", MAKE_AGAIN)
    return origin


def _checked_gaussian(path: Path, arrays: Mapping[str, np.ndarray], suffix: str) -> Gaussian:
    mu, sigma = arrays["mu" + suffix], arrays["sigma" + suffix]
    if sigma.dtype == np.longdouble:
        sigma = sigma.astype(np.float64)  # what it is computed with; LAPACK knows no wider one
    fault = None
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        fault = f"shapes {mu.shape} and {sigma.shape} do not belong together"
    elif not (np.issubdtype(mu.dtype, np.floating) and np.issubdtype(sigma.dtype, np.floating)):
        fault = f"types {mu.dtype} and {sigma.dtype} are no floating-point numbers"
    elif not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        fault = "some values are not finite"
    elif np.abs(sigma - sigma.T).max() > SYMMETRY_TOLERANCE * max(np.abs(sigma).max(), 1e-30):
        fault = "the covariance is not symmetric"
    elif (np.diagonal(sigma) < 0).any():
        fault = "a variance is negative"
    elif not _is_positive(sigma):
        fault = "the covariance has negative eigenvalues"
    if fault:
        raise UserError(f"The statistics in '{path}' are wrong: {fault}.", MAKE_AGAIN)
    return Gaussian(mu, sigma)


def _is_positive(sigma: np.ndarray) -> bool:
    """Whether no eigenvalue is clearly negative. By Cholesky's factors, a third of the time of the eigenvalues."""
    shift = max(NEGATIVE_TOLERANCE * float(np.diagonal(sigma).max()), 1e-30)
    try:
        np.linalg.cholesky(sigma + shift * np.eye(len(sigma)))
    except np.linalg.LinAlgError:
        return False
    return True
