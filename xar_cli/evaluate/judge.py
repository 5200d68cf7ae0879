"""The numbers of one protocol, from feature tables that are there already."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from xar_cli.errors import UserError
from xar_cli.evaluate import metrics, protocols
from xar_cli.evaluate.features import FeatureTable, spread_rows
from xar_cli.evaluate.frechet import Gaussian
from xar_cli.evaluate.images import ImageSet
from xar_cli.evaluate.metrics import Estimate
from xar_cli.evaluate.networks import FeatureNetwork
from xar_cli.evaluate.protocols import Protocol, counted
from xar_cli.evaluate.reference import Reference
from xar_cli.evaluate.results import Metric, ProtocolResult


class Judge:
    """Computes one protocol's numbers.

    Args:
        protocol: which.
        networks: by name, those that were run.
        tables, reference_tables: features of samples and of the reference's images, by network name.
        reference: for statistics that it holds ready-made.
        samples: for labels and class names.
        error_bars: see `metrics.frechet_with_error`.
        extrapolate: also estimate Frechet distances at infinitely many samples.
    """

    def __init__(
        self,
        protocol: Protocol,
        networks: Mapping[str, FeatureNetwork],
        tables: Mapping[str, FeatureTable],
        reference_tables: Mapping[str, FeatureTable],
        reference: Reference,
        samples: ImageSet,
        error_bars: str,
        extrapolate: bool,
    ) -> None:
        self.protocol, self.reference, self.networks = protocol, reference, networks
        self.error_bars, self.extrapolate = error_bars, extrapolate
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
        return table.gaussian(layer), f"reference: {len(table)} images"

    def _frechet(self, key: str, name: str, layer: str, error_bars: str) -> None:
        reference, note = self._reference_gaussian(layer)
        features = self.table.layers[layer]
        self._add(
            key,
            counted(name, self.count),
            metrics.frechet_with_error(features, reference, error_bars, self.labels),
            note,
        )
        if self.extrapolate:
            estimate = metrics.frechet_at_infinity(features, reference, self.labels, with_error=error_bars != "none")
            note = "a line in 1/N, extrapolated to N = infinity"
            if estimate is None:
                note = f"needs {4 * features.shape[1]} samples, four times the dimensions"
            self._add(f"{key}_infinity", f"{name}-infinity", estimate, note)

    def _fid(self) -> None:
        name = "Frechet distance" if self.protocol.name == "digits" else "FID"
        self._frechet(protocols.FID, name, "pool", self.error_bars)

    def _sfid(self) -> None:
        if self.reference.images is None and "spatial" not in self.reference.statistics:
            self._add(
                protocols.SFID,
                counted("sFID", self.count),
                None,
                "the reference has no spatial statistics (mu_s, sigma_s)",
            )
        else:
            self._frechet(protocols.SFID, "sFID", "spatial", self.error_bars)

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
            real = real[spread_rows(len(real), limit)]
        found = metrics.precision_recall(
            self.tables[name].layers["pool"], real, metrics.ADM_NEIGHBOURS, self.networks[name].device
        )
        note = f"{name} features, k = {metrics.ADM_NEIGHBOURS}, {len(real)} reference images"
        for (key, label), value in zip(keys, (found.precision, found.recall), strict=True):
            error = float(np.sqrt(value * (1 - value) / (self.count if key == "precision" else len(real))))
            self._add(key, label, Estimate(value, error), note, True)

    def _accuracy(self) -> None:
        name, asked = counted("class accuracy", self.count), self._asked_classes()
        if asked is None:
            note = "the samples have no labels" if self.labels is None else "class or folder names are no digits"
            self._add(protocols.ACCURACY, name, None, note, True)
            return
        right = self._predictions() == asked
        value = float(right.mean())
        error = float(np.sqrt(value * (1 - value) / len(right)))
        self._add(protocols.ACCURACY, name, Estimate(value, error), "", True)

    def _predictions(self) -> np.ndarray:
        return np.asarray(self.table.layers["logits"]).argmax(axis=1)

    def _asked_classes(self) -> np.ndarray | None:
        """(N,) what the classifier should see in each sample: the number that its class is named by.

        Labels without names are such numbers already; of a folder they are places among its subfolders. None where
        there are no labels, or some class is none of the classifier's.
        """
        if self.labels is None:
            return None
        numbers = {}
        for label in np.unique(self.labels):
            name = self.samples.class_name(int(label))
            if not (name.isascii() and name.isdigit() and int(name) < self.network.layers["logits"]):
                return None
            numbers[int(label)] = int(name)
        return np.array([numbers[int(label)] for label in self.labels])

    def _per_class(self) -> dict[str, dict[str, float]]:
        asked = self._asked_classes() if protocols.ACCURACY in self.protocol.metrics else None
        if asked is None or self.labels is None:
            return {}
        right = self._predictions() == asked
        return {
            self.samples.class_caption(int(label)): {
                "count": int((self.labels == label).sum()),
                "accuracy": float(right[self.labels == label].mean()),
            }
            for label in np.unique(self.labels)
        }
