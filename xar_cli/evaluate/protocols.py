"""The protocols: what each library means by its numbers. A table; what it refers to is computed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xar_cli.errors import UserError, did_you_mean
from xar_cli.evaluate.networks import DIGITS, INCEPTION, INCEPTION_CLEAN, VGG16

FID, SFID, IS, KID, PRECISION_RECALL, ACCURACY = "fid", "sfid", "is", "kid", "precision_recall", "class_accuracy"
PAPER_COUNT = 50_000  # what papers mean by FID, without more words


@dataclass(frozen=True)
class Protocol:
    """One way to measure.

    Attributes:
        name: as `--protocol` takes it; one of the schema's `ProtocolName`.
        network: whose features the Frechet distance is taken in.
        metrics: what it reports, in order.
        precision_network: whose features precision and recall are taken in.
        max_reference: images of the reference that precision and recall use, at most; None for all.
        description: in a sentence.
    """

    name: str
    network: str
    metrics: tuple[str, ...]
    precision_network: str
    max_reference: int | None
    description: str

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of its network whose statistics are compared."""
        return ("pool", "spatial") if SFID in self.metrics else ("pool",)

    def networks(self, with_vgg16: bool) -> list[str]:
        """The networks it needs; VGG16 only where its weights are at hand."""
        found = [self.network]
        if PRECISION_RECALL in self.metrics and self.precision_network not in found:
            found += [self.precision_network] if with_vgg16 else []
        return found


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "adm", INCEPTION, (FID, SFID, IS, PRECISION_RECALL), INCEPTION, 10_000,
            "ADM's suite on torch-fidelity's Inception and resize: IS in splits of 5,000, precision and recall on "
            "Inception features with k = 3 and 10,000 reference images",
        ),
        Protocol(
            "torch-fidelity", INCEPTION, (FID, IS, KID, PRECISION_RECALL), VGG16, None,
            "torch-fidelity's defaults: IS in 10 shuffled splits, KID over 100 subsets of 1,000, precision and recall "
            "on VGG16 features",
        ),
        Protocol(
            "clean-fid", INCEPTION_CLEAN, (FID, KID), INCEPTION_CLEAN, None,
            "clean-fid's antialiased resize and its Inception; its numbers go with no other statistics",
        ),
        Protocol(
            "digits", DIGITS, (FID, ACCURACY, PRECISION_RECALL), DIGITS, None,
            "8 x 8 handwritten digits in the features of a small classifier",
        ),
    )
}  # fmt: skip


def pick_protocols(names: str | Sequence[str]) -> list[Protocol]:
    """Protocols by name, each once, in the order given; names may be joined by commas.

    Raises:
        UserError: one is not known.
    """
    given = [names] if isinstance(names, str) else list(names)
    wanted = [name.strip() for entry in given for name in entry.split(",") if name.strip()]
    if not wanted:
        raise UserError("No protocol is named.", f"Choose from: {', '.join(PROTOCOLS)}.")
    for name in wanted:
        if name not in PROTOCOLS:
            raise UserError(f"There is no protocol '{name}'.", did_you_mean(name, PROTOCOLS))
    return [PROTOCOLS[name] for name in dict.fromkeys(wanted)]


def pick_protocol(names: str | Sequence[str]) -> Protocol:
    """The one protocol that is named.

    Raises:
        UserError: there are several, or it is not known.
    """
    found = pick_protocols(names)
    if len(found) > 1:
        raise UserError(
            f"One protocol is needed, not {len(found)} ({', '.join(one.name for one in found)}).",
            "Give one --protocol.",
        )
    return found[0]


def counted(metric: str, count: int) -> str:
    """A metric's name with its count, without which it compares with nothing.

    FID of 50,000 images is FID, of 10,000 FID-10k, of 297 FID-297; names of words carry the count behind them.
    """
    if count == PAPER_COUNT:
        return metric
    short = f"{count // 1000}k" if count % 1000 == 0 and count else str(count)
    return f"{metric}-{short}" if metric.endswith(("ID", "IS")) else f"{metric} ({short} images)"
