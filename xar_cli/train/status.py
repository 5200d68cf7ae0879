"""What a run folder tells: where the run is, whether it is healthy and why, when it ends.

Files only, and no torch: `xar status` works while the run goes on, from any machine that sees the folder. The run
itself notes in `status.json` what it is doing and why it ended; a kill leaves the note as it was, and its age tells.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
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
NOTE_SECONDS = 60.0  # a run that takes steps renews its note as often
SILENCE = 10.0  # no word for this many times the usual interval means that nothing runs
SILENCE_SECONDS = 120.0
STARTING_SECONDS = 1800.0  # of the first step, which compiles
PAUSE_SECONDS = 3600.0  # of previews and evaluations, and of waiting for the last checkpoint to be on disk
PAUSES = ("drawing", "saving")  # states in which nothing else is written
STOPPED_BY_SIGNAL = 128  # exit codes from here on

ENDED = ("finished", "stopped", "failed")  # states after which nothing comes

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Status:
    """The state of a run.

    Attributes:
        run, recipe: which one.
        state: finished, running, drawing (a preview or an evaluation), saving (the last checkpoint), stopped, failed or
            not started.
        healthy: False if there is anything in `worries`.
        worries: what is wrong, a sentence each.
        step, total_steps, epoch: where it is.
        loss, loss_before: mean of the last records and of as many before them.
        lr, grad_norm, images_per_second, mfu: of the last records.
        skipped_steps: steps that were skipped so far.
        seconds_left: to the end, at the present speed.
        checkpoint_step: newest checkpoint, or None.
        evaluation: the newest one, by metric.
        measured_with: protocol and sampling settings of that evaluation.
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
    measured_with: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


class Steps(Protocol):
    """What counts the steps of a run."""

    step: int


class StateNote:
    """RUN/status.json: what a run does, at which step, since when, and for how long it may be silent while it lives.

    Args:
        run: the run folder.
        counter: its `step` is noted.
        enabled: False on ranks that write nothing.
    """

    def __init__(self, run: RunDir, counter: Steps, enabled: bool) -> None:
        self._run, self._counter, self._enabled = run, counter, enabled
        self._written = 0.0
        self._step_began: float | None = None
        self._longest_step: float | None = None

    def write(self, state: str, why: str = "") -> None:
        """Note a state; whatever comes next is no part of a step."""
        self._step_began, self._written = None, time.monotonic()
        step, patience = self._counter.step, self._patience(state)
        note = {"state": state, "step": step, "why": why, "time": time.time(), "patience": patience}
        if self._enabled:
            with suppress(OSError):  # a full disk ends no run
                write_json(self._run.status, note)

    def _patience(self, state: str) -> float:
        """For how many seconds a run in this state may be silent."""
        if state in PAUSES:
            return PAUSE_SECONDS
        if self._longest_step is None:
            return STARTING_SECONDS
        return max(SILENCE_SECONDS, NOTE_SECONDS + SILENCE * self._longest_step)

    def step_taken(self) -> None:
        """Call after every step; renews the note now and then."""
        now = time.monotonic()
        if self._step_began is not None:
            first, seconds = self._longest_step is None, now - self._step_began
            self._longest_step = max(self._longest_step or 0.0, seconds)
            if first or now - self._written >= NOTE_SECONDS:
                self.write("running")
        self._step_began = now


@contextmanager
def noted_state(run: RunDir, counter: Steps, enabled: bool) -> Iterator[StateNote]:
    """Keep RUN/status.json while a run goes on; arguments as for `StateNote`.

    Leaving the block notes how the run ended: finished, stopped (by a signal or Ctrl-C) or failed, and the sentence.
    """
    note = StateNote(run, counter, enabled)
    note.write("running")
    try:
        yield note
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        if isinstance(error, UserError):
            stopped = error.exit_code >= STOPPED_BY_SIGNAL
        note.write("stopped" if stopped else "failed", str(error) or type(error).__name__)
        raise
    note.write("finished")


def run_status(run: RunDir, now: float | None = None) -> Status:
    """Read a run folder; `now` is the Unix time to judge by.

    Raises:
        UserError: it is none.
    """
    config = load_config_file(run.require().config)
    worries: list[str] = []
    try:
        total = run.read_identity().get("plan", {}).get("total_steps")
    except UserError as error:
        total = None
        worries.append(str(error))
    try:
        saved = run.checkpoint_steps()
    except OSError as error:
        saved = []
        worries.append(f"its checkpoints cannot be read: {error.strerror}")
    everything = read_metrics(run.metrics)
    records = [record for record in everything if "loss" in record]
    evaluations = [record for record in everything if "evaluation" in record]
    step = records[-1]["step"] if records else 0
    note = _noted(run)
    state = _state(note, records, time.time() if now is None else now)
    if not note and total is not None and step == total and saved[-1:] == [total]:  # of a version without notes
        state = "finished"
    worries += find_worries(config, records)
    if note.get("state") in ENDED:
        if note.get("why"):
            worries.append(f"it ended after step {note.get('step', step)}: {note['why']}")
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
        evaluation=evaluations[-1]["evaluation"] if evaluations else None,
        measured_with=evaluations[-1].get("measured_with") if evaluations else None,
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
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(run.status.read_text(encoding="utf-8")))
    return {}


def _state(note: Record, records: Sequence[Record], now: float) -> str:
    """What the run does by its note; where that says that it goes on, by the age of its last sign of life too."""
    if note.get("state") in ENDED:
        return str(note["state"])
    times = [record["time"] for record in records[-WINDOW:] if "time" in record]
    signs = [*times[-1:], *([note["time"]] if "time" in note else [])]
    if not signs:
        return "running" if records else "not started"
    gaps = [after - before for before, after in zip(times[:-1], times[1:], strict=True)]
    usual = SILENCE * statistics.median(gaps) if gaps else 0.0
    patience = max(note.get("patience", SILENCE_SECONDS), usual)  # runs of 0.1.0 have no note
    return "stopped" if now - max(signs) > patience else str(note.get("state", "running"))


def _values(records: Sequence[Record], key: str) -> list[float]:
    return [record[key] for record in records if record.get(key) is not None]


def _mean(records: Sequence[Record], key: str) -> float | None:
    values = _values(records, key)
    return statistics.mean(values) if values else None
