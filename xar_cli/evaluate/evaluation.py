"""The evaluation itself: samples against a reference, by named protocols, to numbers that say what they are.

Owns the order of the work (check everything, extract features once per network, compute) and the results. What a
metric is stands in metrics.py, what a protocol is in protocols.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from xar_cli.config.schema import Section
from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.evaluate import metrics, protocols
from xar_cli.evaluate.features import FeatureTable, content_hash_of, extract
from xar_cli.evaluate.frechet import Gaussian
from xar_cli.evaluate.images import ImageSet, open_images
from xar_cli.evaluate.metrics import Estimate
from xar_cli.evaluate.networks import VGG16, FeatureNetwork, Precision, build_network, require_weights
from xar_cli.evaluate.protocols import Protocol, counted, pick_protocols
from xar_cli.evaluate.reference import Reference, open_reference, write_statistics
from xar_cli.logs import log

COMPILE_FROM = 1000  # images from which compiling the network (a minute or so) pays
ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


class Settings(Section):
    """How to measure; crosses the process border as JSON.

    Attributes:
        count: samples to use, spread evenly over the set; None for all.
        image_size: take ADM's centre crop of that side from image files; None takes them as they are.
        batch_size, workers: images per pass, threads that decode.
        precision: of the Inception networks; bf16 shifts the numbers and is meant for quick looks.
        compile: `auto` compiles torch-fidelity's Inception from 1,000 images on.
        error_bars: see `metrics.frechet_with_error`.
        extrapolate: also estimate the Frechet distance at infinitely many samples.
        skip_bad: leave out images that cannot be read.
        inception_weights, vgg16_weights: files given by a person.
        download: whether missing weights may be fetched.
        feature_cache: folder for features by content hash; None keeps nothing.
    """

    count: int | None = Field(None, gt=1)
    image_size: int | None = Field(None, gt=0)
    batch_size: int = Field(64, gt=0)
    workers: int = Field(4, gt=0)
    precision: Precision = "fp32"
    compile: Literal["auto", "on", "off"] = "auto"
    error_bars: Literal["subsets", "bootstrap", "none"] = "subsets"
    extrapolate: bool = False
    skip_bad: bool = False
    inception_weights: tuple[Path, ...] = ()
    vgg16_weights: Path | None = None
    download: bool = False
    feature_cache: Path | None = None


@dataclass(frozen=True)
class Metric:
    """One number with its name.

    Attributes:
        key: short name for machines.
        name: for people, with the count where the number depends on it.
        value: None where it could not be computed; `note` says why.
        error: standard error, or what the library prints behind its plus-minus.
        note: what else must be known to compare it.
        higher_is_better: which way is good.
    """

    key: str
    name: str
    value: float | None
    error: float | None = None
    note: str = ""
    higher_is_better: bool = False


@dataclass(frozen=True)
class ProtocolResult:
    """What one protocol says.

    Attributes:
        protocol, description: how it was measured.
        network, resize, weights_sha256, published_weights, precision: with what.
        metrics: key to number, in order of importance.
        per_class: class name to {count, accuracy}, where the protocol has a classifier and labels are known.
    """

    protocol: str
    description: str
    network: str
    resize: str
    weights_sha256: str
    published_weights: bool
    precision: str
    metrics: Mapping[str, Metric]
    per_class: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class SetFacts:
    """What was measured: its name, its hash, its images."""

    name: str
    sha256: str
    count: int
    image_size: tuple[int, int] | None = None
    skipped: Sequence[str] = ()
    images_per_second: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The numbers of all protocols, and of what they are.

    Attributes:
        samples, reference: facts of either side.
        results: by protocol name, in the order asked for.
        tables: samples' feature table of each network, for the report; not part of the result.
        reference_tables: the reference's, where its images went through a network.
    """

    samples: SetFacts
    reference: SetFacts
    results: Mapping[str, ProtocolResult]
    tables: Mapping[str, FeatureTable] = field(default_factory=dict, repr=False)
    reference_tables: Mapping[str, FeatureTable] = field(default_factory=dict, repr=False)

    @property
    def first(self) -> ProtocolResult:
        """The result of the first protocol."""
        return next(iter(self.results.values()))

    @property
    def frechet_distance(self) -> float:
        """The Frechet distance by the first protocol."""
        value = self.first.metrics[protocols.FID].value
        assert value is not None
        return value

    @property
    def class_accuracy(self) -> float | None:
        """Share of samples that the classifier of the first protocol puts in the class they were asked to be."""
        found = self.first.metrics.get(protocols.ACCURACY)
        return None if found is None else found.value

    def as_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON; docs/evaluation.md documents it."""
        results = {
            name: {
                **{key: value for key, value in asdict(result).items() if key != "metrics"},
                "metrics": {
                    key: {name: value for name, value in asdict(metric).items() if name != "key"}
                    for key, metric in result.metrics.items()
                },
            }
            for name, result in self.results.items()
        }
        return {"samples": asdict(self.samples), "reference": asdict(self.reference), "protocols": results}


def evaluate(
    samples: Path | ImageSet,
    reference: Path | ImageSet,
    protocol: str | Sequence[str] = "digits",
    *,
    settings: Settings | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure samples against a reference.

    Every rank calls this. Features are computed by all ranks together; the numbers are computed by rank 0 from the
    table of all of them, so they do not depend on how many ranks there are.

    Args:
        samples: folder, ADM `.npz`, HDF5 file, or an opened set.
        reference: folder, ADM batch, or statistics file.
        protocol: one name, or several.

    Returns:
        On rank 0 everything; on other ranks the same with no results.

    Raises:
        UserError: either cannot be read or does not fit, or the weights of a network are missing.
    """
    settings = settings or Settings()
    wanted = pick_protocols(protocol)
    opened = open_images(samples, settings.image_size)
    against = open_reference(reference, settings.image_size)
    weights = _require_all_weights(wanted, settings, with_vgg16=against.images is not None)
    rows = _rows(len(opened), settings.count)
    _require_enough(opened.name, len(rows))
    if against.images is not None and not against.statistics:
        _require_enough(against.name, len(against.images))

    cache = settings.feature_cache
    hashes = {"samples": _main_only(ranks, lambda: content_hash_of(opened, cache)), "reference": against.content_hash}
    if against.images is not None:
        images = against.images
        hashes["reference"] = _main_only(ranks, lambda: content_hash_of(images, cache))

    tables: dict[str, FeatureTable] = {}
    reference_tables: dict[str, FeatureTable] = {}
    networks: dict[str, FeatureNetwork] = {}
    for name, found in weights.items():
        compiled = settings.compile == "on" or (settings.compile == "auto" and len(rows) >= COMPILE_FROM)
        network = build_network(name, found, ranks.device, settings.precision, compiled)
        networks[name] = network
        if name in {one.network for one in wanted}:
            against.gaussian(network, "pool")  # statistics of another network are refused before any work
        _check_sizes(opened, against, network, settings)
        common: dict[str, Any] = {
            "batch_size": settings.batch_size, "workers": settings.workers, "skip_bad": settings.skip_bad,
            "cache": cache,
        }  # fmt: skip
        tables[name] = extract(opened, network, ranks, indices=rows, content_hash=hashes["samples"], **common)
        if against.images is not None:
            everything = np.arange(len(against.images))
            reference_tables[name] = extract(
                against.images, network, ranks, indices=everything, content_hash=hashes["reference"], **common
            )
        _require_enough(opened.name, len(tables[name]))

    first = tables[wanted[0].network]
    facts = SetFacts(
        opened.name, hashes["samples"], len(first), first.image_size, first.skipped, first.images_per_second
    )
    results = {}
    if ranks.is_main:
        for one in wanted:
            judge = _Judge(one, networks, tables, reference_tables, against, opened, settings)
            results[one.name] = judge.result()
    return Evaluation(
        facts, _reference_facts(against, hashes["reference"], reference_tables), results, tables, reference_tables
    )


def make_statistics(
    images: Path | ImageSet, out: Path, protocol: str, *, settings: Settings | None = None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Write the statistics of real images for one protocol, with ADM's names, and return what they are of.

    Raises:
        UserError: as `evaluate`, or the images are generated samples.
    """
    settings = settings or Settings()
    (wanted,) = pick_protocols(protocol)
    opened = open_reference(images, settings.image_size).images
    if opened is None:
        raise UserError(f"'{images}' holds statistics already.", "Give a folder of images.")
    if out.suffix != ".npz":
        raise UserError(f"'{out}' does not end in .npz.", "Give a file name that does.")
    weights = require_weights(wanted.network, settings.inception_weights, settings.download)
    compiled = settings.compile == "on" or (settings.compile == "auto" and len(opened) >= COMPILE_FROM)
    network = build_network(wanted.network, weights, ranks.device, settings.precision, compiled)
    content_hash = _main_only(ranks, lambda: content_hash_of(opened, settings.feature_cache))
    rows = _rows(len(opened), settings.count)
    table = extract(
        opened, network, ranks, indices=rows, content_hash=content_hash, batch_size=settings.batch_size,
        workers=settings.workers, skip_bad=settings.skip_bad, cache=settings.feature_cache,
    )  # fmt: skip
    _require_enough(opened.name, len(table))
    origin = {
        "network": network.name, "resize": network.resize, "weights_sha256": network.weights_sha256,
        "precision": network.precision, "source": opened.name, "content_hash": content_hash, "count": len(table),
        "image_size": table.image_size, "skipped": len(table.skipped),
    }  # fmt: skip
    if ranks.is_main:
        layers = [layer for layer in ("pool", "spatial") if layer in table.layers]
        gaussians = {layer: metrics.moments(table.layers[layer]).gaussian() for layer in layers}
        write_statistics(out, gaussians, origin)
    return origin


class _Judge:
    """Computes one protocol's numbers from the tables."""

    def __init__(
        self,
        protocol: Protocol,
        networks: Mapping[str, FeatureNetwork],
        tables: Mapping[str, FeatureTable],
        reference_tables: Mapping[str, FeatureTable],
        reference: Reference,
        samples: ImageSet,
        settings: Settings,
    ) -> None:
        self.protocol, self.reference, self.settings, self.networks = protocol, reference, settings, networks
        self.tables, self.reference_tables = tables, reference_tables
        self.network, self.table = networks[protocol.network], tables[protocol.network]
        self.labels = None if samples.labels is None else samples.labels[self.table.rows]
        self.samples, self.count = samples, len(self.table)
        self.found: dict[str, Metric] = {}

    def result(self) -> ProtocolResult:
        """All numbers of the protocol."""
        compute = {
            protocols.FID: self._fid,
            protocols.SFID: self._sfid,
            protocols.IS: self._inception_score,
            protocols.KID: self._kid,
            protocols.PRECISION_RECALL: self._precision_recall,
            protocols.ACCURACY: self._accuracy,
        }
        for metric in self.protocol.metrics:
            compute[metric]()
        return ProtocolResult(
            self.protocol.name, self.protocol.description, self.network.name, self.network.resize,
            self.network.weights_sha256, self.network.published, self.network.precision, self.found, self._per_class(),
        )  # fmt: skip

    def _add(self, key: str, name: str, estimate: Estimate | None, note: str = "", higher: bool = False) -> None:
        value, error = (None, None) if estimate is None else (estimate.value, estimate.error)
        if value is not None and not np.isfinite(value):
            raise UserError(f"{name} is not finite.", "Check the images and the weights.", exit_code=1)
        self.found[key] = Metric(key, name, value, error, note, higher)

    def _reference_gaussian(self, layer: str) -> tuple[Gaussian, str]:
        given = self.reference.gaussian(self.network, layer)
        if given is not None:
            return given, "reference: statistics"
        table = self.reference_tables[self.protocol.network]
        return metrics.moments(table.layers[layer]).gaussian(), f"reference: {len(table)} images"

    def _frechet(self, key: str, name: str, layer: str, error_bars: str) -> None:
        reference, note = self._reference_gaussian(layer)
        features = self.table.layers[layer]
        self._add(
            key,
            counted(name, self.count),
            metrics.frechet_with_error(features, reference, error_bars, self.labels),
            note,
        )
        if self.settings.extrapolate:
            estimate = metrics.frechet_at_infinity(features, reference, self.labels)
            note = "a line in 1/N, extrapolated to N = infinity"
            if estimate is None:
                note = f"needs {4 * features.shape[1]} samples, four times the dimensions"
            self._add(f"{key}_infinity", f"{name}-infinity", estimate, note)

    def _fid(self) -> None:
        name = "Frechet distance" if self.protocol.name == "digits" else "FID"
        self._frechet(protocols.FID, name, "pool", self.settings.error_bars)

    def _sfid(self) -> None:
        if self.reference.images is None and "spatial" not in self.reference.statistics:
            self._add(
                protocols.SFID,
                counted("sFID", self.count),
                None,
                "the reference has no spatial statistics (mu_s, sigma_s)",
            )
        else:
            self._frechet(protocols.SFID, "sFID", "spatial", self.settings.error_bars)

    def _inception_score(self) -> None:
        name, logits = counted("IS", self.count), self.table.layers["logits"]
        if self.protocol.name == "torch-fidelity":
            splits = min(10, self.count)
            note = f"{splits} splits of a fixed shuffle"
            self._add(
                protocols.IS,
                name,
                metrics.inception_score(logits, metrics.torch_fidelity_splits(self.count, splits)),
                note,
                True,
            )
            return
        order, note = np.arange(self.count), f"splits of {metrics.ADM_SPLIT} in file order"
        if metrics.is_sorted_by_class(self.labels):
            order = np.random.RandomState(metrics.TORCH_FIDELITY_SEED).permutation(self.count)
            note = f"splits of {metrics.ADM_SPLIT} of a fixed shuffle, because the files are sorted by class"
        self._add(protocols.IS, name, metrics.inception_score(logits, metrics.adm_splits(order)), note, True)

    def _kid(self) -> None:
        name, table = counted("KID", self.count), self.reference_tables.get(self.protocol.network)
        if table is None:
            self._add(protocols.KID, name, None, "needs reference images, not statistics")
            return
        kid = metrics.kid_clean_fid if self.protocol.name == "clean-fid" else metrics.kid_torch_fidelity
        estimate, size = kid(self.table.layers["pool"], table.layers["pool"])
        self._add(protocols.KID, name, estimate, f"{metrics.KID_SUBSETS} subsets of {size}")

    def _precision_recall(self) -> None:
        keys = [("precision", counted("precision", self.count)), ("recall", counted("recall", self.count))]
        reason, name = "", self.protocol.precision_network
        if name not in self.networks:
            reason = "needs VGG16 weights (--vgg16-weights); protocol adm gives them on Inception features"
        elif name not in self.reference_tables:
            reason = "needs reference images, not statistics"
        elif min(self.count, len(self.reference_tables[name])) <= metrics.ADM_NEIGHBOURS:
            reason = f"needs more than {metrics.ADM_NEIGHBOURS} images on both sides"
        if reason:
            for key, label in keys:
                self._add(key, label, None, reason, True)
            return
        real = self.reference_tables[name].layers["pool"]
        limit = self.protocol.max_reference
        if limit is not None and len(real) > limit:
            real = real[_rows(len(real), limit)]
        found = metrics.precision_recall(
            self.tables[name].layers["pool"], real, metrics.ADM_NEIGHBOURS, self.networks[name].device
        )
        note = f"{name} features, k = {metrics.ADM_NEIGHBOURS}, {len(real)} reference images"
        for (key, label), value in zip(keys, (found.precision, found.recall), strict=True):
            error = float(np.sqrt(value * (1 - value) / (self.count if key == "precision" else len(real))))
            self._add(key, label, Estimate(value, error), note, True)

    def _accuracy(self) -> None:
        name = counted("class accuracy", self.count)
        if self.labels is None:
            self._add(protocols.ACCURACY, name, None, "the samples have no labels", True)
            return
        right = self._predictions() == self.labels
        value = float(right.mean())
        error = float(np.sqrt(value * (1 - value) / len(right)))
        self._add(protocols.ACCURACY, name, Estimate(value, error), "", True)

    def _predictions(self) -> np.ndarray:
        return np.asarray(self.table.layers["logits"]).argmax(axis=1)

    def _per_class(self) -> dict[str, dict[str, float]]:
        if protocols.ACCURACY not in self.protocol.metrics or self.labels is None:
            return {}
        right = self._predictions() == self.labels
        return {
            self.samples.class_name(int(label)): {
                "count": int((self.labels == label).sum()),
                "accuracy": float(right[self.labels == label].mean()),
            }
            for label in np.unique(self.labels)
        }


def _require_all_weights(wanted: Sequence[Protocol], settings: Settings, with_vgg16: bool) -> dict[str, Any]:
    """Weights of every distinct network that the protocols need; digits has None, and VGG16 none unless it is given."""
    with_vgg16 = with_vgg16 and settings.vgg16_weights is not None
    names = dict.fromkeys(name for protocol in wanted for name in protocol.networks(with_vgg16))
    given = {VGG16: [settings.vgg16_weights] if settings.vgg16_weights else []}
    return {
        name: require_weights(name, given.get(name, list(settings.inception_weights)), settings.download)
        for name in names
    }


def _rows(available: int, count: int | None) -> np.ndarray:
    """Indices of `count` images, spread evenly, so that a set sorted by class keeps all classes."""
    if count is None or count == available:
        return np.arange(available)
    if count > available:
        raise UserError(f"{count} images are asked for and {available} are there.", "Lower --count or sample more.")
    return np.arange(count) * available // count


def _require_enough(name: str, count: int) -> None:
    if count < 2:
        raise UserError(f"'{name}' holds {count} usable image.", "A distance between distributions needs two at least.")


def _check_sizes(samples: ImageSet, reference: Reference, network: FeatureNetwork, settings: Settings) -> None:
    """Samples and reference of different resolutions differ by their blur, whatever the resize: refuse, or warn."""
    if samples.generated:
        return
    ours = _first_size(samples)
    theirs = reference.origin.get("image_size")
    if reference.images is not None and not settings.image_size:
        theirs = _first_size(reference.images)
    if ours is None or theirs is None or tuple(theirs) == ours or network.input_size is not None:
        return
    message = (
        f"The samples have {ours[1]} x {ours[0]} pixels and the reference '{reference.name}' {theirs[1]} x {theirs[0]}."
    )
    if network.mixes_sizes:
        log.warning(f"{message} clean-fid resizes both, and the blur of the smaller one counts.")
    else:
        raise UserError(message, "Give --image-size to crop a folder of photographs, or a reference of the same size.")


def _first_size(images: ImageSet) -> tuple[int, int] | None:
    for index in range(min(len(images), 3)):
        try:
            shape = images.load(index).shape
        except UserError:
            continue
        return shape[0], shape[1]
    return None


def _reference_facts(reference: Reference, sha256: str, tables: Mapping[str, FeatureTable]) -> SetFacts:
    if tables:
        table = next(iter(tables.values()))
        return SetFacts(reference.name, sha256, len(table), table.image_size, table.skipped, table.images_per_second)
    size = reference.origin.get("image_size")
    return SetFacts(reference.name, sha256, int(reference.origin.get("count", 0)), tuple(size) if size else None)


def _main_only(ranks: Ranks, compute: Any) -> str:
    """A string that rank 0 computes, on every rank."""
    found = ranks.gather(compute() if ranks.is_main else None)[0]
    assert isinstance(found, str)
    return found
