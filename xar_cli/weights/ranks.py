"""One source of weights, opened by several ranks: the same file for all of them, or a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from xar_cli.distributed import Ranks
from xar_cli.errors import UserError
from xar_cli.run_dir import RunDir
from xar_cli.weights.files import WeightsFile, find_weights, removed


def open_on_all(
    source: str, open_here: Callable[[str], WeightsFile], ranks: Ranks, *, ema: bool = True
) -> tuple[WeightsFile, str]:
    """The weights as each rank opens them, and their sha256; all ranks call this.

    A run may be training: its newest checkpoint is the one that rank 0 finds, for all of them.

    Args:
        source: a file, a run or checkpoint folder, or an hf:// name.
        open_here: opens such a source on this rank.
        ranks: of the job; the file is read for its sha256 once on each machine.
        ema: of a run, its averaged weights (True) or the raw ones (False).

    Raises:
        UserError: as `open_here` on any rank, the file cannot be read, or it is not the same on all machines.
    """
    newest = ranks.on_main(lambda: _newest_file(source, ema))

    def opened() -> WeightsFile:
        try:
            return open_here(newest or source)
        except (UserError, FileNotFoundError):
            if newest is None or Path(newest).exists():
                raise
            raise removed(source) from None

    found = ranks.on_all(opened)
    hashes = ranks.gather(ranks.on_all(lambda: _sha256(found) if ranks.local_rank == 0 else None))
    if len({digest for digest in hashes if digest}) > 1:
        raise UserError(
            f"'{source}' is not the same file on all ranks.", "Give all machines the same one; of a hub, a @revision."
        )
    return found, str(hashes[0])


def _newest_file(source: str, ema: bool) -> str | None:
    """The file of weights in the checkpoint that is now the newest of a run; None for other sources."""
    return str(find_weights(source, ema=ema).path) if RunDir(Path(source)).exists() else None


def _sha256(found: WeightsFile) -> str:
    try:
        return found.sha256
    except OSError as error:
        raise UserError(
            f"'{found.path}' cannot be read: {error.strerror}.",
            "Check the disk, or run the command again where a run has replaced this checkpoint by a newer one.",
            exit_code=1,
        ) from None
