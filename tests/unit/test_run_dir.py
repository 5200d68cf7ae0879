"""Paths in a run, atomic writes, and the checks before writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from xar_cli import run_dir
from xar_cli.errors import UserError
from xar_cli.run_dir import RunDir, format_bytes, is_there, require_writable, write_atomic, write_json


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_dir.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]


def test_write_json_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 1\n}\n'


def test_require_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        RunDir(tmp_path).require()
    (tmp_path / "config.yaml").write_text("name: x\n")
    assert RunDir(tmp_path).require().exists()


@pytest.fixture
def shut(tmp_path, monkeypatch):
    """A folder that may not be entered, for a root user too."""
    folder, stat = tmp_path / "shut", Path.stat
    folder.mkdir()

    def refusing(path, **options):
        if folder in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refusing)
    return folder


def test_a_folder_that_may_not_be_entered_is_a_sentence(shut):
    for ask in (is_there, lambda path: RunDir(path).exists(), lambda path: require_writable(path, 0, "images")):
        with pytest.raises(UserError, match=r"shut/in/side' cannot be opened: Permission denied\.") as caught:
            ask(shut / "in" / "side")
        assert caught.value.next_step == "Check the path."


def test_what_is_there(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    assert is_there(tmp_path)
    assert is_there(tmp_path / "file")
    for path in ("link", "none", "file/below"):
        assert not is_there(tmp_path / path)


def test_too_small_a_disk_is_refused_with_both_numbers(tmp_path):
    target = tmp_path / "not" / "there"
    require_writable(target, 0, "images")
    with pytest.raises(UserError, match=r"1000\.0 TB needed, .* free"):
        require_writable(target, 10**15, "images")
    assert not (tmp_path / "not").exists()


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write images"):
        require_writable(tmp_path / "file" / "folder", 0, "images")


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1500, "1.5 KB"), (19.1e9, "19.1 GB"), (2e12, "2.0 TB")])
def test_format_bytes(count, text):
    assert format_bytes(count) == text
