"""Files on the hub, against a hub on loopback; each call is a process, for the library reads HF_* once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub.utils import GatedRepoError, HFValidationError

from tests.fake_hub import FakeHub, running_hub
from xar_cli.errors import UserError
from xar_cli.hub import HubFile, absolute_source, keep_if_sound, local_file, parse_hub_name, require_repo_name

FETCH = """
import sys
from xar_cli.errors import UserError
from xar_cli.hub import local_file
try:
    print(local_file(sys.argv[1]))
except UserError as error:
    print("error:", error.message, error.next_step, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


def fetch(hub: FakeHub, cache: Path, source: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FETCH, source],
        env=hub.environment(cache) | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_file_is_fetched_once_and_found_again_without_the_hub(hub, tmp_path):
    hub.add("someone/model", "sub/weights.pth", b"the weights")
    hub.add("someone/model", "sub/weights.pth", b"older weights", revision="v1")
    first = fetch(hub, tmp_path, "hf://someone/model/sub/weights.pth")
    assert Path(first.stdout.strip()).read_bytes() == b"the weights"
    older = fetch(hub, tmp_path, "hf://someone/model/sub/weights.pth@v1")
    assert len(hub.gets()) == 2
    assert older.returncode == 0
    fetch(hub, tmp_path, "hf://someone/model/sub/weights.pth")
    assert len(hub.gets()) == 2  # asked whether it changed, not fetched again
    hub.requests.clear()
    offline = fetch(hub, tmp_path, "hf://someone/model/sub/weights.pth", HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout
    assert hub.requests == []


def test_the_revision_chooses_the_content(hub, tmp_path):
    hub.add("someone/model", "weights.pth", b"new")
    hub.add("someone/model", "weights.pth", b"old", revision="v1")
    path = fetch(hub, tmp_path, "hf://someone/model/weights.pth@v1").stdout.strip()
    assert Path(path).read_bytes() == b"old"


def test_a_cut_connection_is_resumed_where_it_broke(hub, tmp_path):
    content = bytes(range(256)) * 100_000
    hub.add("someone/model", "weights.pth", content)
    hub.cut_after = 20_000_000
    result = fetch(hub, tmp_path, "hf://someone/model/weights.pth")
    assert Path(result.stdout.strip()).read_bytes() == content
    first, second = hub.gets()
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= 20_000_000


@pytest.mark.parametrize(
    ("source", "said", "code"),
    [
        ("hf://nobody/model/weights.pth", "no repository", 2),
        ("hf://someone/model/weights.pth@v9", "no such revision", 2),
        ("hf://someone/model/wieghts.pth", "no such file", 2),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_a_sentence(hub, tmp_path, source, said, code):
    hub.add("someone/model", "weights.pth", b"weights")
    result = fetch(hub, tmp_path, source)
    assert result.returncode == code
    assert said in result.stderr
    assert source in result.stderr
    assert "Traceback" not in result.stderr


def test_offline_without_a_copy_says_so(hub, tmp_path):
    result = fetch(hub, tmp_path, "hf://someone/model/weights.pth", HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert "not in the local cache" in result.stderr
    assert hub.requests == []


def test_a_disk_that_takes_no_file_is_not_called_the_network(hub, tmp_path):
    hub.add("someone/model", "weights.pth", b"weights")
    (tmp_path / "file").touch()
    result = fetch(hub, tmp_path / "file" / "cache", "hf://someone/model/weights.pth")
    assert result.returncode == 1
    assert f"The disk failed at '{tmp_path / 'file'}" in result.stderr
    assert "set HF_HOME" in result.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [(GatedRepoError("no", response=Mock(headers={})), "behind a gate"), (HFValidationError("no"), "not a valid name")],
)
def test_what_the_hub_library_refuses_is_a_sentence(monkeypatch, error, said):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Mock(side_effect=error))
    with pytest.raises(UserError, match=said):
        local_file("hf://a/b/c")


def test_names():
    assert parse_hub_name("weights/file.pth") is None
    assert parse_hub_name("hf://a/b/c/d.pth@refs/pr/1") == HubFile("a/b", "c/d.pth", "refs/pr/1")
    assert parse_hub_name(Path("hf://a/b/c.pth@v1")) == HubFile("a/b", "c.pth", "v1")
    assert str(HubFile("a/b", "c.pth", "v1")) == "hf://a/b/c.pth@v1"
    assert local_file("some/file") == Path("some/file")
    assert absolute_source(Path("file")) == Path.cwd() / "file"
    assert parse_hub_name(absolute_source(Path("hf://a/b/c.pth"))) == HubFile("a/b", "c.pth")


@pytest.mark.parametrize("name", ["hf://a/b", "hf://a", "hf:///b/c", "hf://a/b/c@", "hf://a/b//c", "hf://a/b/../c"])
def test_bad_names_are_refused(name):
    with pytest.raises(UserError, match="is not a file on the hub"):
        parse_hub_name(name)


@pytest.mark.parametrize("name", ["model", "a/b/c", "a b/c", "/c"])
def test_bad_repositories_are_refused(name):
    with pytest.raises(UserError, match="is not a repository"):
        require_repo_name(name)


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    keep_if_sound(tmp_path / "file", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(UserError, match="was damaged"):
        keep_if_sound(tmp_path / "link", "00" * 32)
    assert list(tmp_path.iterdir()) == []
