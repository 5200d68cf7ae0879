"""A cache's moments in memory, one copy for all processes of a machine.

The copy is a file of shared memory (/dev/shm), so it is read as any other file of rows is, by the same code.
The first process that asks makes it while the others wait; the last one that closes removes it. Killed
processes leave it behind: the next one that asks takes it over.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from xar_cli.data.cache_file import CacheFile, Shard
from xar_cli.errors import UserError
from xar_cli.run_dir import format_bytes, write_at

try:
    import fcntl
except ImportError:  # pragma: no cover - not POSIX
    fcntl = None  # type: ignore[assignment]

SHARED_MEMORY = Path("/dev/shm")
_DONE = b"whole"  # at the end of a copy that was finished
_BLOCK = 1 << 24


class MemoryCopy:
    """All rows of a cache in shared memory.

    Args:
        file: the cache; processes with caches of the same content share the copy.

    Attributes:
        shard: where the copy's rows lie, as the reader knows it.

    Raises:
        UserError: there is no shared memory here, or too little.
    """

    def __init__(self, file: CacheFile) -> None:
        if fcntl is None or not SHARED_MEMORY.is_dir():
            raise UserError("There is no /dev/shm here to hold latents in.", "Leave in-memory reading off.")
        if not file.shards:
            raise UserError(
                f"'{file.path}' is chunked or compressed, and only plain rows can be held in memory.",
                "Leave in-memory reading off, or make the cache anew with `xar cache-latents`.",
            )
        layout = file.layout
        self._size = layout.row_bytes * layout.num_samples
        offsets = {name: i * self._size for i, name in enumerate(layout.moments_names)}
        self._end = self._size * len(offsets)
        self._path = SHARED_MEMORY / f"xar-latents-{os.getuid()}-{file.content_hash()[:24]}"
        self._pid = os.getpid()
        self._descriptor = self._hold()
        self.shard = Shard(self._path, 0, layout.num_samples, offsets)
        try:
            if not self._is_whole(self._descriptor):
                self._copy(file)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the copy; the last process to do so removes it."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            if os.getpid() == self._pid:  # a forked child shares the lock of its parent and must not judge by it
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._path.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # others still read it
        finally:
            os.close(descriptor)

    def _hold(self) -> int:
        """Open the file: with others if it is whole, else alone, after waiting for who is copying."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not self._is_whole(descriptor):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor
            os.close(descriptor)  # removed meanwhile by the last process that read it

    def _is_whole(self, descriptor: int) -> bool:
        return os.pread(descriptor, len(_DONE), self._end) == _DONE

    def _copy(self, file: CacheFile) -> None:
        free = shutil.disk_usage(SHARED_MEMORY).free + os.fstat(self._descriptor).st_blocks * 512
        if free < self._end + _BLOCK:
            raise UserError(
                f"The latents do not fit into shared memory: {format_bytes(self._end)} needed, "
                f"{format_bytes(free)} free in {SHARED_MEMORY}.",
                "Leave in-memory reading off, or enlarge /dev/shm (in a container: --shm-size).",
            )
        os.ftruncate(self._descriptor, 0)
        os.ftruncate(self._descriptor, self._end)
        for i, name in enumerate(file.layout.moments_names):
            for shard in file.shards:
                place = i * self._size + shard.start * file.layout.row_bytes
                self._copy_range(shard, shard.offsets[name], place, (shard.stop - shard.start) * file.layout.row_bytes)
        os.pwrite(self._descriptor, _DONE, self._end)

    def _copy_range(self, shard: Shard, source: int, target: int, count: int) -> None:
        with shard.path.open("rb", buffering=0) as file:
            while count:
                data = os.pread(file.fileno(), min(count, _BLOCK), source)
                if not data:
                    raise OSError(f"{shard.path}: the file has become shorter while it was being read")
                write_at(self._descriptor, data, target)
                source, target, count = source + len(data), target + len(data), count - len(data)
