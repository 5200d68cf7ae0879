"""What a run folder tells: where the run is, whether it is healthy and why, when it ends.

Files only, and no torch: `xar status` works while the run goes on, from any machine that sees the folder. The run
itself notes in `status.json` what it is doing and why it ended; a kill leaves the note as it was, and its age tells.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from xar_cli.config import Config, load_config_file
from xar_cli.errors import UserError
from xar_cli.logs import read_metrics
from xar_cli.run_dir import RunDir, write_json

WINDOW = 20  # records that are compared with as many before them
RISE = 3.0  # the loss is rising if it is up by this many standard errors
GRADIENT_GROWTH = 3.0
THROUGHPUT_LOSS = 0.7
SILENCE = 10.0  # no word for this many times the usual interval means that nothing runs
SILENCE_SECONDS = 120.0
DRAWING_SECONDS = 3600.0  # of previews and evaluations, in which nothing else is written
STOPPED_BY_SIGNAL = 128  # exit codes from here on

ENDED = ("finished", "stopped", "failed")  # states after which nothing comes

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Status:
    """The state of a run.

    Attributes:
        run, recipe: which one.
        state: finished, running, drawing (a preview or an evaluation), stopped, failed or not started.
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


class Steps(Protocol):
    """What counts the steps of a run."""

    step: int


@contextmanager
def noted_state(run: RunDir, counter: Steps, enabled: bool) -> Iterator[Callable[[str], None]]:
    """Keep RUN/status.json while a run goes on; the yielded function notes what it does now.

    Leaving the block notes how the run ended: finished, stopped (by a signal or Ctrl-C) or failed, and the sentence.

    Args:
        run: the run folder.
        counter: its `step` is noted too.
        enabled: False on ranks that write nothing.
    """

    def note(state: str, why: str = "") -> None:
        if enabled:
            with suppress(OSError):  # a full disk ends no run
                write_json(run.status, {"state": state, "step": counter.step, "why": why, "time": time.time()})

    note("running")
    try:
        yield note
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        if isinstance(error, UserError):
            stopped = error.exit_code >= STOPPED_BY_SIGNAL
        note("stopped" if stopped else "failed", str(error) or type(error).__name__)
        raise
    note("finished")


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
    note = _noted(run)
    state = _state(note, records, time.time() if now is None else now)
    if not note and total is not None and step == total and saved[-1:] == [total]:  # of a version without notes
        state = "finished"
    worries = find_worries(config, records)
    if note.get("state") in ENDED:
        if note["why"]:
            worries.append(f"it ended after step {note['step']}: {note['why']}")
    elif state == "stopped":
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


def _noted(run: RunDir) -> Record:
    """What the run noted of itself, or nothing: it is read while others write."""
    with suppress(OSError, ValueError):
        return dict(json.loads(run.status.read_text(encoding="utf-8")))
    return {}


def _state(note: Record, records: Sequence[Record], now: float) -> str:
    """What the run does by its note; where that says that it goes on, by the age of its last sign of life too."""
    if note.get("state") in ENDED:
        return str(note["state"])
    times = [record["time"] for record in records[-WINDOW:] if "time" in record]
    signs = [*times[-1:], *([note["time"]] if note else [])]
    if not signs:
        return "running" if records else "not started"
    gaps = [after - before for before, after in zip(times[:-1], times[1:], strict=True)]
    patience = max(SILENCE_SECONDS, SILENCE * statistics.median(gaps)) if gaps else SILENCE_SECONDS
    doing = str(note.get("state", "running"))
    if doing == "drawing":
        patience = max(patience, DRAWING_SECONDS)
    return "stopped" if now - max(signs) > patience else doing


def _values(records: Sequence[Record], key: str) -> list[float]:
    return [record[key] for record in records if record.get(key) is not None]


def _mean(records: Sequence[Record], key: str) -> float | None:
    values = _values(records, key)
    return statistics.mean(values) if values else None
