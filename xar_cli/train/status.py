"""What a run folder tells: where the run is, whether it is healthy and why, when it ends.

Reads files only, and needs no torch: it works while the run goes on, from any machine that sees the folder.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xar_cli.config import Config, load_config_file
from xar_cli.logs import read_metrics
from xar_cli.run_dir import RunDir

WINDOW = 20  # records that are compared with as many before them
RISE = 3.0  # the loss is rising if it is up by this many standard errors
GRADIENT_GROWTH = 3.0
THROUGHPUT_LOSS = 0.7
SILENCE = 10.0  # no word for this many times the usual interval means that nothing runs
SILENCE_SECONDS = 120.0

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Status:
    """The state of a run.

    Attributes:
        run, recipe: which one.
        state: finished, running, stopped or not started.
        healthy: False if there is anything in `worries`.
        worries: what is wrong, a sentence each.
        step, total_steps, epoch: where it is.
        loss, loss_before: mean of the last records and of as many before them.
        lr, grad_norm, images_per_second, mfu: of the last records.
        skipped_steps: steps that were skipped so far.
        seconds_left: to the end, at the present speed.
        checkpoint_step: newest checkpoint, or None.
        evaluation: the newest one, by metric.
    """

    run: str
    recipe: str
    state: str
    healthy: bool
    worries: list[str]
    step: int
    total_steps: int | None
    epoch: float | None = None
    loss: float | None = None
    loss_before: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    images_per_second: float | None = None
    mfu: float | None = None
    skipped_steps: int = 0
    seconds_left: float | None = None
    checkpoint_step: int | None = None
    evaluation: Mapping[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def run_status(run: RunDir, now: float | None = None) -> Status:
    """Read a run folder; `now` is the Unix time to judge by.

    Raises:
        UserError: it is none.
    """
    config = load_config_file(run.require().config)
    identity = json.loads(run.identity.read_text(encoding="utf-8")) if run.identity.exists() else {}
    total = identity.get("plan", {}).get("total_steps")
    everything = read_metrics(run.metrics)
    records = [record for record in everything if "loss" in record]
    evaluations = [record["evaluation"] for record in everything if "evaluation" in record]
    saved = sorted(int(folder.name.removeprefix("step-")) for folder in run.checkpoints.glob("step-*"))
    step = records[-1]["step"] if records else 0
    state = _state(records, step, total, time.time() if now is None else now)
    worries = find_worries(config, records)
    if state == "stopped":
        worries.append(f"nothing was written for long after step {step}: the run stopped, crashed or hangs")
    last, before = records[-WINDOW:], records[-2 * WINDOW : -WINDOW]
    newest: Record = records[-1] if records else {}
    return Status(
        run=str(run.root),
        recipe=config.name,
        state=state,
        healthy=not worries,
        worries=worries,
        step=step,
        total_steps=total,
        epoch=newest.get("epoch"),
        loss=_mean(last, "loss"),
        loss_before=_mean(before, "loss"),
        lr=newest.get("lr"),
        grad_norm=_mean(last, "grad_norm"),
        images_per_second=_mean(last, "images_per_second"),
        mfu=newest.get("mfu"),
        skipped_steps=sum(record.get("skipped_steps", 0) for record in records),
        seconds_left=None if state == "finished" else newest.get("seconds_left"),
        checkpoint_step=saved[-1] if saved else None,
        evaluation=evaluations[-1] if evaluations else None,
    )


def find_worries(config: Config, records: Sequence[Record]) -> list[str]:
    """What looks wrong in the records of a run, a sentence each."""
    last, before = records[-WINDOW:], records[-2 * WINDOW : -WINDOW]
    worries = []
    skipped = sum(record.get("skipped_steps", 0) for record in last)
    if skipped and not (config.train.precision == "fp16" and skipped <= 2):  # the loss scale feels its way
        worries.append(f"{skipped} of the last steps were skipped because loss or gradient was not finite")
    if len(before) < WINDOW:
        return worries  # too early to compare
    new, old = _values(last, "loss"), _values(before, "loss")
    if len(new) > 1 and len(old) > 1:
        error = (statistics.variance(new) / len(new) + statistics.variance(old) / len(old)) ** 0.5
        rise = statistics.mean(new) - statistics.mean(old)
        if rise > RISE * error and rise > 0.01 * abs(statistics.mean(old)):
            worries.append(f"the loss is rising: {statistics.mean(old):.4f} before, {statistics.mean(new):.4f} now")
    new, old = _values(last, "grad_norm"), _values(before, "grad_norm")
    if new and old and statistics.median(new) > GRADIENT_GROWTH * statistics.median(old):
        worries.append(f"gradients are growing: {statistics.median(old):.2f} before, {statistics.median(new):.2f} now")
    new, old = _values(last, "images_per_second"), _values(records[:-WINDOW], "images_per_second")
    if new and old and statistics.median(new) < THROUGHPUT_LOSS * statistics.median(old):
        worries.append(
            f"it has become slow: {statistics.median(old):.0f} images/s before, {statistics.median(new):.0f} now"
        )
    return worries


def _state(records: Sequence[Record], step: int, total: int | None, now: float) -> str:
    if not records:
        return "not started"
    if step == total:
        return "finished"
    times = [record["time"] for record in records[-WINDOW:] if "time" in record]
    gaps = [after - before for before, after in zip(times[:-1], times[1:], strict=True)]
    patience = max(SILENCE_SECONDS, SILENCE * statistics.median(gaps)) if gaps else SILENCE_SECONDS
    return "stopped" if times and now - times[-1] > patience else "running"


def _values(records: Sequence[Record], key: str) -> list[float]:
    return [record[key] for record in records if record.get(key) is not None]


def _mean(records: Sequence[Record], key: str) -> float | None:
    values = _values(records, key)
    return statistics.mean(values) if values else None
