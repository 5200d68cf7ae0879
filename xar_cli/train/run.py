"""Starting or going on with a run folder: which recipe, which data, up to where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from xar_cli import __version__
from xar_cli.config import Config, check_new_run, dump_config, load_config_file
from xar_cli.data.latents import LatentReader
from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.lock import JobLock
from xar_cli.logs import log, read_metrics
from xar_cli.run_dir import RunDir, is_there, require_writable, write_atomic, write_json
from xar_cli.train.initial import source_name

# Changes under which a run stays the run it is; --allow-recipe-change accepts them.
HARMLESS = frozenset({
    "train.max_batch_per_rank", "train.parallel", "train.activation_checkpointing", "train.compile", "train.log_every",
    "train.checkpoint_every", "train.keep_last", "train.keep_every", "train.max_bad_steps", "train.loggers",
    "train.preview_every", "train.preview_count", "train.eval_every", "train.eval_count", "data.dataset",
    "data.num_images",
})  # fmt: skip
# Changes that steer the optimisation from here on, while checkpoints still hold; accepted too, with a warning.
STEERING = frozenset({
    "train.precision", "train.base_lr", "train.min_lr", "train.warmup_fraction", "train.decay_start_fraction",
    "train.epochs", "train.grad_clip", "train.weight_decay", "train.label_dropout", "model.dropout",
})  # fmt: skip
ALWAYS_FREE = ("name", "description")  # these say nothing about the run
FREE_SECTIONS = ("published", "sample", "evaluate")  # read by other stages, which take their own settings


@contextmanager
def only_job(run: RunDir, ranks: Ranks) -> Iterator[None]:
    """The right to write a run folder, held by rank 0 for all ranks.

    The system lets go of it when rank 0 dies, also by kill -9. A folder that is made for it goes again if no run
    comes to be in it.

    Raises:
        UserError: another job has it, or the folder is no place for a run; on all ranks.
    """
    with ExitStack() as held:
        ranks.on_main(lambda: held.enter_context(_locked(run)))
        yield


@contextmanager
def _locked(run: RunDir) -> Iterator[None]:
    _check_place(run)
    made = [folder for folder in (run.root, *run.root.parents) if not folder.exists()]
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        lock = JobLock(run.lock, f"The run '{run.root}' is being trained")
    except OSError as error:
        _remove_empty(made)
        raise UserError(
            f"The run folder '{run.root}' cannot be written to: {error.strerror}.",
            "Choose another --out or fix its permissions.",
        ) from None
    with lock:
        lock.take()
        try:
            yield
        finally:
            if not run.exists():
                with suppress(OSError):
                    lock.remove()
                _remove_empty(made)


def check_run(out: Path, config: Config, needed_bytes: int, allow_change: bool = False) -> RunDir:
    """The run folder at `out`, fit to be started or gone on with; nothing is written.

    Args:
        out: the folder.
        config: the recipe to train.
        needed_bytes: what checkpoints need on its disk.
        allow_change: accept a changed recipe where the checkpoints still hold.

    Raises:
        UserError: the folder holds something else, or a run with another recipe, or its disk is too small; or the
            recipe is one that no run should begin with.
    """
    run = RunDir(out)
    if run.exists():
        _check_changes(run, config, allow_change)
        needed_bytes -= sum(file.stat().st_size for file in run.checkpoints.glob("step-*/*"))
    else:
        check_new_run(config)
    _check_place(run)
    require_writable(out, max(needed_bytes, 0), "checkpoints")
    return run


def check_start(run: RunDir, init_from: str | None, goes_on: bool) -> None:
    """Raise a UserError where a run was started from other weights than now asked for.

    Args:
        run: the run folder; its run.json tells what the run was started from.
        init_from: what `--init-from` says.
        goes_on: whether there is a checkpoint: then the option may be left away.
    """
    identity = run.read_identity()
    if "init_from" not in identity:  # a new run, or one of a version that did not write it down
        if init_from is not None and goes_on:
            log.warning("--init-from has no effect: the run goes on from its checkpoint.")
        return
    given = source_name(init_from) if init_from is not None else None
    recorded = identity["init_from"]["source"] if identity["init_from"] else None
    if given == recorded or (given is None and goes_on):
        return
    if recorded is None:
        raise UserError(
            f"The run '{run.root}' was started without --init-from.",
            "Leave --init-from away, or give another --out.",
        )
    if given is None:
        raise UserError(
            f"The run '{run.root}' was started from '{recorded}' and has no checkpoint yet.",
            f"Repeat --init-from {recorded}, or give another --out.",
        )
    raise UserError(
        f"The run '{run.root}' was started from '{recorded}', not from '{given}'.",
        f"Give --init-from {recorded}, or another --out.",
    )


def check_data(run: RunDir, reader: LatentReader) -> None:
    """Raise a UserError where a run was made with another latent cache."""
    identity = run.read_identity()
    if identity.get("data_hash") != reader.content_hash:
        raise UserError(
            f"The run '{run.root}' was made with another latent cache, '{identity.get('data', 'unknown')}'.",
            "Give that cache with --data, or another --out.",
        )


def open_run(
    run: RunDir,
    config: Config,
    data: Path,
    reader: LatentReader,
    plan: Mapping[str, Any],
    start: Mapping[str, Any] | None = None,
) -> None:
    """Create the run folder, or take note in the one there of what has changed.

    Args:
        run: the run folder.
        config: the recipe.
        data: the latent cache.
        reader: the same, open.
        plan: how the run is cut.
        start: what a run that begins at step 0 tells of its start (`init_from`); None where it goes on.

    Raises:
        UserError: the run was made with another latent cache.
    """
    for left in run.left_by_a_kill():
        left.unlink(missing_ok=True)
    if not run.exists():
        identity = {
            "xar": __version__,
            "data": str(data),
            "data_hash": reader.content_hash,
            "class_names": list(reader.class_names),
            "class_titles": list(reader.class_titles),
            **(start or {}),
            "plan": dict(plan),
            "changes": [],
        }
        write_json(run.identity, identity)
        write_atomic(run.config, dump_config(config))  # last: with it, the folder is a run
        return
    check_data(run, reader)
    identity = run.read_identity()
    differences = config_differences(load_config_file(run.config), config)
    changes = [*identity.get("changes", []), *([list(differences.values())] if differences else [])]
    updated = {**identity, **(start or {}), "plan": dict(plan), "changes": changes}
    if updated != identity:
        write_json(run.identity, updated)
        write_atomic(run.config, dump_config(config))


def check_agreement(ranks: Ranks, config: Config, reader: LatentReader) -> None:
    """Raise a UserError on all ranks unless all have the same recipe, cache and program."""
    recipe = hashlib.sha256(config.model_dump_json().encode()).hexdigest()
    everyones: list[Any] = ranks.gather({"recipe": recipe, "latent cache": reader.content_hash, "xar": __version__})
    for what, mine in everyones[0].items():
        others = [rank for rank, theirs in enumerate(everyones) if theirs[what] != mine]
        if others:
            listed = ", ".join(map(str, others[:8])) + (" and more" if len(others) > 8 else "")
            raise UserError(
                f"Rank {listed} has another {what} than rank 0.",
                "Start all ranks with the same command, on the same files and the same version of xar.",
            )


def cut_records(run: RunDir, step: int) -> None:
    """Drop what metrics.jsonl and skipped_steps.jsonl tell of steps after `step`, which are about to be taken again.

    A torn last line, left by a kill, goes too.
    """
    for path in (run.metrics, run.skipped_steps):
        records = read_metrics(path)
        kept = [record for record in records if record["step"] <= step]
        if len(kept) != len(records):
            log.info("%d records after step %d leave %s.", len(records) - len(kept), step, path.name)
        if len(kept) != len(records) or _ends_torn(path):
            write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))


def _ends_torn(path: Path) -> bool:
    return path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")


def config_differences(old: Config, new: Config) -> dict[str, str]:
    """Every value that counts in which two configs differ: key -> 'train.epochs: 800 there, 400 here'."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return {
        key: f"{key}: {before.get(key)} there, {after.get(key)} here"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and key not in ALWAYS_FREE and key.split(".")[0] not in FREE_SECTIONS
    }


def _check_place(run: RunDir) -> None:
    """Raise a UserError where neither a run is, nor room for one."""
    out = run.root
    if not is_there(out) or run.exists():
        return
    if not out.is_dir() or not set(out.iterdir()) <= _left_by_a_killed_start(run):
        raise UserError(f"'{out}' is not empty and is not a run folder.", "Give another --out.")


def _left_by_a_killed_start(run: RunDir) -> set[Path]:
    """What a job may leave that was killed before its run had come to be: the config is written last."""
    ours = {run.lock, *run.left_by_a_kill()}
    try:
        return ours | {run.identity} if "data_hash" in run.read_identity() else ours
    except UserError:  # somebody else's: ours is written whole or not at all
        return ours


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _check_changes(run: RunDir, config: Config, allow_change: bool) -> None:
    differences = config_differences(load_config_file(run.config), config)
    if not differences:
        return
    listed = "; ".join(differences.values())
    barred = [key for key in differences if key not in HARMLESS | STEERING]
    if barred:
        raise UserError(
            f"'{run.root}' holds a run with another recipe: {listed}.",
            f"Its checkpoints do not hold for another {', '.join(barred)}: give another --out, or the same settings.",
        )
    if not allow_change:
        raise UserError(
            f"'{run.root}' holds a run with another recipe: {listed}.",
            "Add --allow-recipe-change to go on with it, or give the same settings or another --out.",
        )
    steering = [text for key, text in differences.items() if key in STEERING]
    if steering:
        log.warning("From here on the run is optimised differently: %s.", "; ".join(steering))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
