"""Starting or going on with a run folder: which config, which data, up to where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xar_cli import __version__
from xar_cli.config import Config, dump_config, load_config_file
from xar_cli.data.latents import LatentReader
from xar_cli.errors import UserError
from xar_cli.logs import log, read_metrics
from xar_cli.run_dir import RunDir, require_writable, write_atomic, write_json


def check_cache(reader: LatentReader, config: Config) -> None:
    """Raise a UserError where a latent cache does not fit the recipe."""
    reader.check_matches(config)
    if config.data.mirror and not reader.flip:
        raise UserError(
            f"The recipe '{config.name}' trains on mirror images too, and the cache holds none.",
            "Make the cache with --flip encode, or train with --set data.mirror=false.",
        )


def check_run(out: Path, config: Config, needed_bytes: int) -> RunDir:
    """The run folder at `out`, fit to be started or gone on with; nothing is written.

    Raises:
        UserError: the folder holds something else, or a run with another config, or its disk is too small.
    """
    run = RunDir(out)
    if run.exists():
        differences = config_differences(load_config_file(run.config), config)
        if differences:
            raise UserError(
                f"'{out}' holds a run with another config: {'; '.join(differences)}.",
                "Give another --out, or the same settings to go on with that run.",
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' is not empty and is not a run folder.", "Give another --out.")
    require_writable(out, needed_bytes, "checkpoints")
    return run


def open_run(run: RunDir, config: Config, data: Path, reader: LatentReader) -> None:
    """Create the run folder, or check that the run there was made with the same data.

    Raises:
        UserError: the run was made with another latent cache.
    """
    if not run.exists():
        identity = {
            "xar": __version__,
            "data": str(data),
            "data_hash": reader.content_hash,
            "class_names": list(reader.class_names),
            "class_titles": list(reader.class_titles),
        }
        write_json(run.identity, identity)
        write_atomic(run.config, dump_config(config))
        return
    identity = json.loads(run.identity.read_text(encoding="utf-8"))
    if identity["data_hash"] != reader.content_hash:
        raise UserError(
            f"The run '{run.root}' was made with another latent cache, '{identity['data']}'.",
            "Give that cache with --data, or another --out.",
        )


def cut_metrics(run: RunDir, step: int) -> None:
    """Drop the records after `step` from metrics.jsonl: the steps that are about to be taken again."""
    records = read_metrics(run.metrics)
    kept = [record for record in records if record["step"] <= step]
    if len(kept) != len(records):
        log.info("%d records after step %d leave %s.", len(records) - len(kept), step, run.metrics.name)
        write_atomic(run.metrics, "".join(json.dumps(record) + "\n" for record in kept))


def config_differences(old: Config, new: Config) -> list[str]:
    """Every value in which two configs differ, as 'train.epochs: 800 there, 400 here'."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)} there, {after.get(key)} here"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and key not in ("name", "description")
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
