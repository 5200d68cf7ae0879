"""The evaluation itself: samples against a reference, by named protocols, to numbers that say what they are.

Owns the settings and the order of the work: check everything, extract features once per network, compute. How one
protocol's numbers are computed stands in judge.py, what comes out in results.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import Field

from xar_cli.config.schema import Section, Sides, height_and_width, pixels_text, sides_text
from xar_cli.data.images import BadImageError
from xar_cli.device_memory import memory_for
from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.evaluate.digits import weights_sha256 as digits_sha256
from xar_cli.evaluate.features import FeatureTable, content_hash_of, extract, spread_rows
from xar_cli.evaluate.images import ImageSet, open_images
from xar_cli.evaluate.judge import Judge
from xar_cli.evaluate.networks import NETWORKS, VGG16, FeatureNetwork, Precision, build_network, require_weights
from xar_cli.evaluate.protocols import Protocol, pick_protocol, pick_protocols
from xar_cli.evaluate.reference import Reference, open_reference, require_replaceable, write_statistics
from xar_cli.evaluate.results import Evaluation, SetFacts
from xar_cli.evaluate.weights import Weights
from xar_cli.logs import log
from xar_cli.run_dir import require_writable

COMPILE_FROM = 1000  # images from which compiling the network (a minute or so) pays
ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


class Settings(Section):
    """How to measure; crosses the process border as JSON.

    Attributes:
        count: samples to use, spread evenly over the set; None for all.
        image_size: take ADM's centre crop of that size (one side, or height and width) from image files; None takes
            them as they are.
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
    image_size: Sides | None = None
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


def evaluate(
    samples: Path | ImageSet,
    reference: Path | ImageSet | Reference,
    protocol: str | Sequence[str] = "digits",
    *,
    settings: Settings | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure one set of samples against a reference; arguments and errors are those of `Evaluator`."""
    return Evaluator(reference, protocol, settings=settings, ranks=ranks).evaluate(samples)


class Evaluator:
    """Measures sets of samples against one reference, by named protocols.

    Networks and the reference's features are made when the first set comes, and serve all others. Every rank calls
    all methods. Features are computed by all ranks together; the numbers are computed by rank 0 from the table of all
    of them, so they do not depend on how many ranks there are.

    Args:
        reference: folder, ADM batch, or statistics file, or an opened one.
        protocol: one name, or several.
        settings: how to measure.
        ranks: who measures.

    Raises:
        UserError: the reference cannot be read, the weights of a network are missing, or ranks have not the same.
    """

    def __init__(
        self,
        reference: Path | ImageSet | Reference,
        protocol: str | Sequence[str] = "digits",
        *,
        settings: Settings | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._settings, self._ranks = settings or Settings(), ranks
        self._protocols, self._reference, self._weights = ranks.on_all(
            lambda: _open_inputs(reference, protocol, self._settings)
        )
        _require_same(ranks, "reference", self._outline_of_reference)
        _require_same(ranks, "network weights", lambda: str(self._weight_hashes()))
        self._work = _Extraction(self._settings, ranks)
        self._networks: dict[str, FeatureNetwork] = {}
        self._reference_tables: dict[str, FeatureTable] = {}

    def prepare(self, count: int) -> None:
        """Build the networks, compiled where `count` images pay for it; nothing where that is done.

        Raises:
            UserError: a network cannot be built, or the reference's statistics do not go with it.
        """
        for name, found in self._weights.items():
            if name in self._networks:
                continue
            network = self._work.network(name, found, count)
            for layer in dict.fromkeys(layer for one in self._protocols if one.network == name for layer in one.layers):
                self._reference.gaussian(network, layer)  # raises where they do not go together
            self._networks[name] = network

    def evaluate(self, samples: Path | ImageSet) -> Evaluation:
        """Measure a folder, ADM `.npz`, HDF5 file, or an opened set.

        Returns:
            On rank 0 everything; on other ranks the same with no results.

        Raises:
            UserError: the samples cannot be read, do not fit, or are not the same on all ranks; as `prepare`.
        """
        settings, work = self._settings, self._work
        opened = self._ranks.on_all(lambda: open_images(samples, settings.image_size))
        _require_same(self._ranks, "samples", opened.outline)
        rows = spread_rows(len(opened), settings.count)
        _require_enough(opened.name, len(rows))
        size = _size_of(opened)
        self._check_sizes(size)
        self.prepare(len(rows))  # what does not fit is refused before any work
        tables: dict[str, FeatureTable] = {}
        for name, network in self._networks.items():
            tables[name] = work.table(opened, network, rows)
            _require_enough(opened.name, len(tables[name]))
            self._add_reference_table(network)
            if size is None:  # a generator that did not say it before
                size = tables[name].image_size
                self._check_sizes(size)

        results = {}
        if self._ranks.is_main:
            for one in self._protocols:
                results[one.name] = Judge(
                    one, self._networks, tables, self._reference_tables, self._reference, opened, settings.error_bars,
                    settings.extrapolate,
                ).result()  # fmt: skip
        facts = _facts(opened.name, work.content_hash(opened), tables[self._protocols[0].network])
        return Evaluation(facts, self._reference_facts(), results, tables, self._reference_tables)

    def identity(self) -> dict[str, Any]:
        """What numbers depend on beside samples and settings, by content: the reference, each network's weights."""
        digest = self._reference.content_hash
        if not digest and self._reference.images is not None:
            digest = self._work.content_hash(self._reference.images)
        return {"reference_sha256": digest, "network_weights": self._weight_hashes()}

    def _weight_hashes(self) -> dict[str, str]:
        return {name: digits_sha256() if found is None else found.sha256 for name, found in self._weights.items()}

    def _outline_of_reference(self) -> str:
        images = self._reference.images
        return self._reference.content_hash or (images.outline() if images is not None else "")

    def _check_sizes(self, size: tuple[int, int] | None) -> None:
        for name in self._weights:
            _check_sizes(size, self._reference, NETWORKS[name])

    def _add_reference_table(self, network: FeatureNetwork) -> None:
        images = self._reference.images
        if images is not None and network.name not in self._reference_tables:
            self._reference_tables[network.name] = self._work.table(images, network, np.arange(len(images)))

    def _reference_facts(self) -> SetFacts:
        """Facts of the reference; a file of statistics goes by its own hash, whatever images it holds beside them."""
        reference, tables = self._reference, self._reference_tables
        if reference.images is not None and tables:
            sha256 = reference.content_hash or self._work.content_hash(reference.images)
            return _facts(reference.name, sha256, next(iter(tables.values())))
        size = reference.origin.get("image_size")
        count = int(reference.origin.get("count", 0))
        return SetFacts(reference.name, reference.content_hash, count, tuple(size) if size else None)


def check_inputs(
    reference: Path | ImageSet | Reference,
    protocol: str | Sequence[str],
    settings: Settings,
    image_size: Sides | None = None,
) -> None:
    """Raise the UserError that `evaluate` would raise before it looks at any sample of this size."""
    _, against, weights = _open_inputs(reference, protocol, settings)
    if image_size is not None:
        for name in weights:
            _check_sizes(height_and_width(image_size), against, NETWORKS[name])


def make_statistics(
    images: Path | ImageSet, out: Path, protocol: str, *, settings: Settings | None = None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Write the statistics of real images for one protocol, with ADM's names, and return what they are of.

    Raises:
        UserError: as `Evaluator`, the images are generated samples, `out` is a file that is none of ours, or (exit code
            1) it cannot be written.
    """
    settings = settings or Settings()
    wanted = pick_protocol(protocol)
    opened = ranks.on_all(lambda: open_reference(images, settings.image_size)).images
    if opened is None:
        raise UserError(f"'{images}' holds statistics already.", "Give a folder of images.")
    _require_same(ranks, "images", opened.outline)
    if out.suffix != ".npz":
        raise UserError(f"'{out}' does not end in .npz.", "Give a file name that does.")
    require_replaceable(out)
    weights = ranks.on_all(lambda: require_weights(wanted.network, settings.inception_weights, settings.download))
    _require_same(ranks, "network weights", lambda: "" if weights is None else weights.sha256)
    rows = spread_rows(len(opened), settings.count)
    work = _Extraction(settings, ranks)
    network = work.network(wanted.network, weights, len(rows))
    table = work.table(opened, network, rows)
    _require_enough(opened.name, len(table))
    origin = {
        "network": network.name, "resize": network.resize, "weights_sha256": network.weights_sha256,
        "precision": network.precision, "source": opened.name, "content_hash": work.content_hash(opened),
        "count": len(table), "image_size": table.image_size, "skipped": len(table.skipped),
    }  # fmt: skip

    def write() -> None:
        layers = [layer for layer in ("pool", "spatial") if layer in table.layers]
        gaussians = {layer: table.gaussian(layer) for layer in layers}
        try:
            write_statistics(out, gaussians, origin)
        except OSError as error:
            raise UserError(
                f"'{out}' could not be written: {error.strerror}.", "Make room, or give another --out.", exit_code=1
            ) from None

    ranks.on_main(write)
    return origin


def _require_same(ranks: Ranks, what: str, tell: Callable[[], str]) -> None:
    """Raise a UserError on all ranks unless `tell` says the same on each: together they make one table."""
    if ranks.world_size > 1 and len(set(ranks.gather(tell()))) > 1:
        raise UserError(
            f"Not all ranks have the same {what}.", "Use copies that are the same, of which none is being written."
        )


class _Extraction:
    """Networks and tables by the settings of one evaluation; each set's content hash is computed once."""

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        if settings.feature_cache is not None:
            cache = settings.feature_cache
            ranks.on_all(lambda: require_writable(cache, 1 << 20, "the features"))
        self.settings, self.ranks = settings, ranks
        self._hashes: WeakKeyDictionary[ImageSet, str] = WeakKeyDictionary()

    def network(self, name: str, weights: Weights | None, count: int) -> FeatureNetwork:
        """A network, compiled where `count` images pay for it."""
        mode = self.settings.compile
        compiled = mode == "on" or (mode == "auto" and count >= COMPILE_FROM)

        def built() -> FeatureNetwork:
            with memory_for(f"The network '{name}'", "Evaluate on another device, or without training beside it."):
                return build_network(name, weights, self.ranks.device, self.settings.precision, compiled)

        return self.ranks.on_all(built)

    def content_hash(self, images: ImageSet) -> str:
        """The content hash of a set, read by rank 0."""
        if images not in self._hashes:
            cache = self.settings.feature_cache
            self._hashes[images] = self.ranks.on_main(lambda: content_hash_of(images, cache))
        return self._hashes[images]

    def table(self, images: ImageSet, network: FeatureNetwork, rows: np.ndarray) -> FeatureTable:
        """Features of some images of a set."""
        settings = self.settings
        return extract(
            images, network, self.ranks, indices=rows, content_hash=self.content_hash(images),
            batch_size=settings.batch_size, workers=settings.workers, skip_bad=settings.skip_bad,
            cache=settings.feature_cache,
        )  # fmt: skip


def _open_inputs(
    reference: Path | ImageSet | Reference, protocol: str | Sequence[str], settings: Settings
) -> tuple[list[Protocol], Reference, dict[str, Weights | None]]:
    """All that an evaluation needs beside samples: protocols, reference, weights of the networks."""
    wanted = pick_protocols(protocol)
    against = open_reference(reference, settings.image_size)
    if against.images is not None and not against.statistics:
        _require_enough(against.name, len(against.images))
    return wanted, against, _require_all_weights(wanted, settings, with_vgg16=against.images is not None)


def _require_all_weights(wanted: Sequence[Protocol], settings: Settings, with_vgg16: bool) -> dict[str, Weights | None]:
    """Weights of every distinct network that the protocols need; digits has None, and VGG16 none unless it is given."""
    with_vgg16 = with_vgg16 and settings.vgg16_weights is not None
    names = dict.fromkeys(name for protocol in wanted for name in protocol.networks(with_vgg16))
    given = {VGG16: [settings.vgg16_weights] if settings.vgg16_weights else []}
    return {
        name: require_weights(name, given.get(name, list(settings.inception_weights)), settings.download)
        for name in names
    }


def _require_enough(name: str, count: int) -> None:
    if count < 2:
        raise UserError(f"'{name}' holds {count} usable image.", "A distance between distributions needs two at least.")


def _check_sizes(ours: tuple[int, int] | None, reference: Reference, network: type[FeatureNetwork]) -> None:
    """Samples and reference of different resolutions differ by their blur, whatever the resize: refuse, or warn."""
    theirs = reference.origin.get("image_size") if reference.images is None else _size_of(reference.images)
    if ours is None or theirs is None or tuple(theirs) == ours or network.input_size is not None:
        return
    message = f"The samples have {pixels_text(ours)} and the reference '{reference.name}' {sides_text(theirs)}."
    if network.mixes_sizes:
        log.warning(f"{message} clean-fid resizes both, and the blur of the smaller one counts.")
    else:
        raise UserError(
            message,
            "Give a reference of the same size: `xar fid` and `xar fid stats` crop a folder of photographs with "
            "--image-size.",
        )


def _size_of(images: ImageSet) -> tuple[int, int] | None:
    """Height and width, where anybody knows: a generator's stand in its manifest, so that nothing is drawn for them."""
    if images.generated:
        size = (images.manifest or {}).get("image_size")
        return None if size is None else height_and_width(size)
    for index in range(len(images)):  # the first is enough, unless it is bad
        try:
            shape = images.load(index).shape
        except BadImageError:
            continue
        return shape[0], shape[1]
    return None


def _facts(name: str, sha256: str, table: FeatureTable) -> SetFacts:
    return SetFacts(name, sha256, len(table), table.image_size, table.skipped, table.images_per_second)
