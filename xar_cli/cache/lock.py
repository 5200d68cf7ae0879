"""One job per cache: an advisory lock beside the file, which the system lets go of when its holder dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xar_cli.errors import UserError
from xar_cli.logs import log

try:
    import fcntl
except ImportError:  # pragma: no cover - not POSIX
    fcntl = None  # type: ignore[assignment]


@contextmanager
def cache_lock(path: Path) -> Iterator[None]:
    """Hold the sole right to write the cache at `path`.

    The lock is the file `.<name>.lock` beside the cache; it names its holder and lies free once the holder is
    gone, also after kill -9.

    Raises:
        UserError: another process holds it; the text names that process.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"The latent cache '{path}' is being written by {_holder(descriptor)}.",
                    "Wait for it or stop it; then run the command again.",
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                log.warning(
                    f"'{path.parent}' cannot lock files: take care that no second process writes this cache"
                )
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {value['pid']} on {value['host']}, since {value['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
