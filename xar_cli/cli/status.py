"""`xar status`: where a run is, whether it is healthy, when it ends."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from xar_cli.cli.options import JsonOption
from xar_cli.cli.printing import print_rows
from xar_cli.run_dir import RunDir


def status(
    run: Annotated[Path, typer.Argument(help="Run folder that `xar train --out` wrote.")], as_json: JsonOption = False
) -> None:
    """Say how a training run is doing, from its folder alone; it may be running elsewhere."""
    from xar_cli.train.status import run_status

    found = run_status(RunDir(run))
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    left = None if found.seconds_left is None else str(timedelta(seconds=round(found.seconds_left)))
    rows = [
        ("run", f"{found.run} ({found.recipe})"),
        ("state", found.state),
        ("health", "good" if found.healthy else "; ".join(found.worries)),
        ("step", f"{found.step:,} of {found.total_steps or 0:,}" + (f", epoch {found.epoch:g}" if found.epoch else "")),
        ("time left", left),
        ("loss", _compared(found.loss, found.loss_before)),
        ("gradient norm", _form(found.grad_norm, ".3f")),
        ("learning rate", _form(found.lr, ".2e")),
        ("images/s", _form(found.images_per_second, ".1f")),
        ("MFU", _form(found.mfu, ".1%")),
        ("skipped steps", str(found.skipped_steps)),
        ("newest checkpoint", None if found.checkpoint_step is None else f"step {found.checkpoint_step:,}"),
        *((name, f"{value:.4g}") for name, value in (found.evaluation or {}).items()),
        ("measured with", found.measured_with),
    ]
    print_rows([(name, value) for name, value in rows if value is not None])


def _compared(loss: float | None, before: float | None) -> str | None:
    """A loss beside the one before it, where there is one."""
    told = _form(loss, ".4f")
    return told if told is None or before is None else f"{told} (before: {before:.4f})"


def _form(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)
