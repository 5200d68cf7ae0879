"""What an evaluation gives: numbers with their names, what they were measured with, and of what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from xar_cli.evaluate import protocols
from xar_cli.evaluate.features import FeatureTable


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
