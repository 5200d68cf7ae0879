"""Where the records of a run go: metrics.jsonl always, TensorBoard and Weights & Biases by setting.

A disk that is full does not end a run: what could not be written is kept and tried again with the next record. Nor does
a logger that fails: it gets nothing more.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Protocol

from xar_cli.config.schema import Config
from xar_cli.errors import UserError
from xar_cli.logs import MetricsWriter, log
from xar_cli.run_dir import RunDir

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # logger -> package and extra of ours


class Logger(Protocol):
    """A place that shows a run while it goes on."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Show some numbers of a step."""

    def image(self, step: int, path: Path) -> None:
        """Show a picture."""

    def close(self) -> None:
        """Finish."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: RunDir, config: Config, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.root / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, path: Path) -> None:
        """Add a picture."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image("preview", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases with the name of the run folder; going on continues it.

    Its own step counter never goes back and drops what is logged for an earlier step, which is where a run goes on
    after a kill. So the step is a value like the others, the axis of all charts, and the counter counts records.

    Raises:
        UserError: it does not start (exit code 1); `check_login` finds most reasons earlier.
    """

    def __init__(self, run: RunDir, config: Config, first_step: int) -> None:
        import hashlib

        import wandb

        name = run.root.resolve()
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project="xar", name=name.name, id=hashlib.sha256(str(name).encode()).hexdigest()[:16], resume="allow",
                dir=str(run.root), config=config.model_dump(mode="json"), allow_val_change=True,
            )  # fmt: skip
        except wandb.Error as error:
            raise _did_not_start(error) from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values."""
        self._run.log({**values, "step": step})

    def image(self, step: int, path: Path) -> None:
        """Log a picture."""
        self._run.log({"preview": self._wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


LOGGERS: dict[str, Callable[[RunDir, Config, int], Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_loggers(names: Sequence[str]) -> None:
    """Raise a UserError where the package of a logger is not installed."""
    for name in names:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError:
            raise UserError(
                f"train.loggers names {name}, which is not installed.", f"Install it: pip install 'xar-cli[{name}]'."
            ) from None


def check_login(names: Sequence[str]) -> None:
    """Raise a UserError (exit code 1) where a logger wants a login and has none, or none that its server takes."""
    if "wandb" in names:
        import wandb

        try:
            wandb.login()  # asks for nothing where WANDB_MODE is offline or disabled
        except wandb.Error as error:
            raise _did_not_start(error) from None


def _did_not_start(error: Exception) -> UserError:
    return UserError(
        f"Weights & Biases did not start: {error}",
        "Run `wandb login`, set WANDB_MODE=offline, or take wandb out of train.loggers.",
        exit_code=1,
    )


def _opened(name: str, run: RunDir, config: Config, first_step: int) -> Logger:
    try:
        return LOGGERS[name](run, config, first_step)
    except OSError as error:
        raise UserError(
            f"The logger {name} did not start: {error}.",
            f"Free some disk space, or take {name} out of train.loggers.",
            exit_code=1,
        ) from None


class Records:
    """Writes the records of one run.

    Args:
        run: the run folder.
        config: the recipe; its `train.loggers` are opened.
        first_step: steps taken already.
        enabled: False on ranks that write nothing.

    Raises:
        UserError: a logger does not start (exit code 1).
    """

    def __init__(self, run: RunDir, config: Config, first_step: int, enabled: bool) -> None:
        self._run, self._enabled = run, enabled
        self._waiting: list[dict[str, Any]] = []
        self._told = False  # that the disk is full
        if enabled:
            self._loggers: list[Logger] = []
            with ExitStack() as opened:  # closed again where one of them fails
                self._metrics = MetricsWriter(run.metrics)
                opened.callback(self.close)
                for name in config.train.loggers:
                    self._loggers.append(_opened(name, run, config, first_step))
                opened.pop_all()

    def write(self, record: dict[str, Any]) -> None:
        """Add one record; it holds at least `step`."""
        if not self._enabled:
            return
        self._waiting.append({**record, "time": round(time.time(), 3)})
        try:
            while self._waiting:
                self._metrics.write(**self._waiting[0])
                self._waiting.pop(0)
            self._told = False
        except OSError as error:
            if not self._told:
                log.error("A record could not be written (%s): the run goes on. Free some disk space.", error)
            self._told = True
            self._reopen()
        numbers = {name: float(value) for name, value in record.items() if isinstance(value, (int, float))}
        for name, values in record.items():
            if isinstance(values, list):
                numbers.update({f"{name}/{place}": value for place, value in enumerate(values) if value is not None})
            elif isinstance(values, dict):
                numbers.update({f"{name}/{key}": float(value) for key, value in values.items()})
        self._tell_loggers(lambda logger: logger.write(record["step"], numbers))

    def bad_step(self, **values: Any) -> None:
        """Add a line to RUN/skipped_steps.jsonl; on a full disk the line is lost and the run goes on."""
        if not self._enabled:
            return
        try:
            with closing(MetricsWriter(self._run.skipped_steps)) as file:  # cuts off a line torn by a full disk
                file.write(**values)
        except OSError as error:
            log.error("A line of skipped_steps.jsonl could not be written (%s): the run goes on.", error)

    def image(self, step: int, path: Path) -> None:
        """Show a picture in the loggers, if it could be written."""
        if self._enabled and path.exists():
            self._tell_loggers(lambda logger: logger.image(step, path))

    def close(self) -> None:
        """Close all."""
        if not self._enabled:
            return
        try:
            self._metrics.close()
        except OSError as error:
            log.error("The last records could not be written: %s.", error)
        self._tell_loggers(lambda logger: logger.close())

    def _tell_loggers(self, tell: Callable[[Logger], None]) -> None:
        """Tell every logger; one that fails, whatever its package raises, is told once and left out from then on."""
        for logger in list(self._loggers):
            try:
                tell(logger)
            except Exception as error:
                self._loggers.remove(logger)
                log.error("%s failed (%s): it gets no more records, and the run goes on.", type(logger).__name__, error)

    def _reopen(self) -> None:
        """Leave the file as a kill would: opening it cuts off a torn line."""
        with suppress(OSError):  # its buffer cannot be written either
            self._metrics.close()
        self._metrics = MetricsWriter(self._run.metrics)
