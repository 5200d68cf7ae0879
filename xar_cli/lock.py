"""One job at a time: an advisory lock on a small file, which the system lets go of when its holders die.

Owns the lock and who holds it; what it guards (a latent cache, a run folder) is the stage's business.
"""

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


class JobLock:
    """The right to write something: a lock on a file of its own, free again when all holders are gone, also after
    kill -9.

    The first process of a job takes it alone; it may then share it with the other ranks.

    Args:
        path: the lock's file; its folder must be there.
        used: what a second job is told, up to the name of the holder: "The latent cache 'x.h5' is being written".

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, used: str) -> None:
        self._path, self._used = path, used
        self._descriptor = self._open()

    def take(self) -> None:
        """Hold the lock alone, and write down who holds it; raises a UserError that names another holder."""
        self._lock(alone=True)
        while not self._in_place():  # a holder before has removed the file: what is locked is no longer seen by others
            os.close(self._descriptor)
            self._descriptor = self._open()
            self._lock(alone=True)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(me).encode(), 0)

    def share(self) -> None:
        """Hold the lock together with the other ranks of the job; raises a UserError as `take`."""
        self._lock(alone=False)

    def remove(self) -> None:
        """Remove its file, while it is held alone; it is let go of by `close`."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)

    def __enter__(self) -> JobLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _lock(self, alone: bool) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self._used} by {self._holder()}.", "Wait for it or stop it; then run the command again."
            ) from None
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            log.warning("No file can be locked in '%s': start no second job there.", self._path.parent)

    def _holder(self) -> str:
        try:
            value = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"process {value['pid']} on {value['host']}, since {value['since']}"
        except (ValueError, KeyError, TypeError):
            return "another process"
