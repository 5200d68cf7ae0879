"""What runs in every process of `xar fid` and `xar fid stats`, and what `xar fid doctor` looks at."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xar_cli.config.schema import Section
from xar_cli.distributed import process_group
from xar_cli.errors import UserError
from xar_cli.evaluate.evaluation import Settings, evaluate, make_statistics
from xar_cli.evaluate.images import ImageSet, open_images
from xar_cli.evaluate.networks import DIGITS
from xar_cli.evaluate.protocols import PROTOCOLS, pick_protocol, pick_protocols
from xar_cli.evaluate.reference import Reference, open_reference
from xar_cli.evaluate.report import facts_of_sampling, write_report
from xar_cli.evaluate.results import Evaluation
from xar_cli.evaluate.weights import PUBLISHED, find_weights
from xar_cli.run_dir import require_possible, require_writable
from xar_cli.stopping import stop_at_once

REPORT_BYTES = 20_000_000


class FidSettings(Section):
    """What `xar fid` was asked for.

    Attributes:
        samples, reference: paths.
        protocols: names, in the order to report.
        measure: how to measure.
        report: folder for the report, or None.
        device: auto, cpu, cuda or cuda:N.
    """

    samples: Path
    reference: Path
    protocols: tuple[str, ...]
    measure: Settings
    report: Path | None = None
    device: str = "auto"


class StatisticsSettings(Section):
    """What `xar fid stats` was asked for."""

    images: Path
    out: Path
    protocol: str
    measure: Settings
    device: str = "auto"


def fid(settings: FidSettings) -> dict[str, Any]:
    """Measure, and write the report where one is asked for; returns what `--json` prints."""
    pick_protocols(settings.protocols)  # a wrong name is told before folders are read
    if settings.report is not None:
        require_writable(settings.report, REPORT_BYTES, "the report")
    with process_group(settings.device) as ranks, stop_at_once(signal.SIGTERM):
        samples = ranks.on_all(lambda: open_images(settings.samples, settings.measure.image_size))
        made = facts_of_sampling(samples)
        reference = ranks.on_all(lambda: open_reference(settings.reference, settings.measure.image_size))
        found = evaluate(samples, reference, settings.protocols, settings=settings.measure, ranks=ranks)
        if not ranks.is_main:
            return {}
        return result_and_report(found, made, samples, reference, settings.measure, settings.report)


def result_and_report(
    found: Evaluation,
    made: Mapping[str, Any],
    samples: ImageSet,
    reference: Reference,
    measure: Settings,
    report: Path | None,
) -> dict[str, Any]:
    """What `--json` prints, with the report written where one is asked for; one that fails costs no number."""
    result = found.as_dict()
    if report is None:
        return result
    try:
        paths = write_report(report, found, made, samples, reference, measure)
    except (OSError, UserError) as error:
        reason = f"{error.strerror}." if isinstance(error, OSError) else str(error)
        return {**result, "report_failure": f"The report in '{report}' is not whole: {reason}"}
    return {**result, "report": {name: str(path) for name, path in paths.items()}}


def statistics(settings: StatisticsSettings) -> dict[str, Any]:
    """Write a statistics file; returns what `--json` prints."""
    pick_protocol(settings.protocol)
    require_possible(settings.out)
    require_writable(settings.out.parent, 1 << 27, "the statistics")
    with process_group(settings.device) as ranks, stop_at_once(signal.SIGTERM):
        origin = make_statistics(
            settings.images, settings.out, settings.protocol, settings=settings.measure, ranks=ranks
        )
        if not ranks.is_main:
            return {}
        return {"statistics": str(settings.out), **origin}


def doctor(measure: Settings) -> dict[str, dict[str, Any]]:
    """For each protocol: whether it can run here, with which weights, and what is missing. Fetches nothing."""
    report = {}
    for protocol in PROTOCOLS.values():
        weights: dict[str, str] = {}
        missing: list[str] = []
        for network in protocol.networks(with_vgg16=True):
            if network == DIGITS:
                weights[network] = "shipped with the package"
                continue
            given = list(measure.inception_weights) if PUBLISHED[network].option == "--inception-weights" else []
            if network == "vgg16" and measure.vgg16_weights:
                given = [measure.vgg16_weights]
            try:
                found = find_weights(network, given)
                kind = "published, sha256 checked" if found.published else "not the published file"
                weights[network] = f"{found.path} ({kind})"
            except UserError as error:
                missing.append(f"{error.message} {error.next_step}")
        report[protocol.name] = {
            "runs": protocol.network in weights,
            "what": protocol.description,
            "weights": weights,
            "missing": missing,
        }
    return report
