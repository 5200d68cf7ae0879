"""One job per cache: an advisory lock beside the file, which the system lets go of when its holders die."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path

from xar_cli.errors import UserError
from xar_cli.logs import log

try:
    import fcntl
except ImportError:  # pragma: no cover - not POSIX
    fcntl = None  # type: ignore[assignment]

_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class CacheLock:
    """The right to write a cache: a lock on the file `.<name>.lock` beside it, free again when all holders
    are gone, also after kill -9.

    The first process of a job takes it alone, and then shares it with its other ranks.

    Args:
        path: the cache file; its folder must be there.
    """  # fmt: skip

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)

    def take(self) -> None:
        """Hold the lock alone, and write down who holds it; raises a UserError that names another holder."""
        self._lock(alone=True)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(me).encode(), 0)

    def share(self) -> None:
        """Hold the lock together with the other ranks of the job; raises a UserError as `take`."""
        self._lock(alone=False)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)

    def __enter__(self) -> CacheLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self, alone: bool) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"The latent cache '{self.path}' is being written by {self._holder()}.",
                "Wait for it or stop it; then run the command again.",
            ) from None
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            log.warning(f"no file can be locked in '{self.path.parent}': start no second job on this cache")

    def _holder(self) -> str:
        try:
            value = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"process {value['pid']} on {value['host']}, since {value['since']}"
        except (ValueError, KeyError, TypeError):
            return "another process"
