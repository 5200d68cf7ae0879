import json
import os
import socket

import pytest

from xar_cli.errors import UserError
from xar_cli.lock import JobLock


def lock(path):
    return JobLock(path, "The thing is being made")


def test_a_second_holder_is_told_who_the_first_is(tmp_path):
    with lock(tmp_path / "lock") as first, lock(tmp_path / "lock") as second:
        first.take()
        with pytest.raises(UserError) as caught:
            second.take()
        first_words = f"The thing is being made by process {os.getpid()} on {socket.gethostname()}, since "
        assert caught.value.message.startswith(first_words)
        with pytest.raises(UserError):
            second.share()
        first.share()
        second.share()
    with lock(tmp_path / "lock") as third:
        third.take()


def test_a_lock_on_a_removed_file_does_not_count(tmp_path):
    """The second one has the file open when the first removes it: its lock must be on the file that others see."""
    first, second, third = (lock(tmp_path / "lock") for _ in range(3))
    first.take()
    first.remove()
    first.close()
    second.take()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    with pytest.raises(UserError):
        third.take()
    second.close()
    third.close()
