"""Weights: found where a person says, else in torch.hub's folder, checked; fetched only when asked."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xar_cli.errors import UserError
from xar_cli.evaluate import weights as module
from xar_cli.evaluate.evaluation import Settings
from xar_cli.evaluate.stage import doctor
from xar_cli.evaluate.weights import PUBLISHED, find_weights, is_torchscript

CONTENT = b"weights, or so they say"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty torch.hub folder, and published files of known content that lie in a folder, not on the net."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source = tmp_path / "server" / "file"
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    known = {"url": source.as_uri(), "sha256": hashlib.sha256(CONTENT).hexdigest(), "size": len(CONTENT)}
    for name, file in PUBLISHED.items():
        monkeypatch.setitem(PUBLISHED, name, replace(file, **known))
    return tmp_path / "hub" / "checkpoints"


def test_missing_weights_say_where_to_get_them(hub) -> None:
    with pytest.raises(UserError) as caught:
        find_weights("inception")
    assert "weights-inception-2015-12-05-6726825d.pth" in caught.value.message
    for part in ("--inception-weights", "--download", PUBLISHED["inception"].url):
        assert part in caught.value.next_step
    assert not hub.exists()  # nothing was fetched in silence


def test_download_is_checked_and_kept(hub) -> None:
    found = find_weights("inception", download=True)
    assert found.path == hub / PUBLISHED["inception"].filename
    assert found.path.read_bytes() == CONTENT
    assert found.published
    assert find_weights("inception") == found  # from torch.hub's folder now


def test_a_download_of_something_else_leaves_nothing(hub, tmp_path) -> None:
    (tmp_path / "server" / "file").write_bytes(b"an error page")
    with pytest.raises(UserError) as caught:
        find_weights("inception", download=True)
    assert caught.value.exit_code == 1
    assert list(hub.iterdir()) == []


def test_a_damaged_file_in_the_hub_folder_is_refused(hub) -> None:
    hub.mkdir(parents=True)
    (hub / PUBLISHED["inception"].filename).write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="damaged"):
        find_weights("inception")


def test_tmp_is_never_looked_at(hub, monkeypatch) -> None:
    """clean-fid would take /tmp/inception-2015-12-05.pt, whatever it is."""
    looked: list[str] = []
    real = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: looked.append(str(self)) or real(self))
    with pytest.raises(UserError):
        find_weights("inception-clean")
    assert looked == [str(hub / "inception-2015-12-05.pt")]


def test_given_files_go_to_the_network_of_their_format(hub, inception_files) -> None:
    given = [inception_files.clean, inception_files.torch_fidelity]
    assert find_weights("inception", given).path == inception_files.torch_fidelity
    assert find_weights("inception-clean", given).path == inception_files.clean
    assert not find_weights("inception", given).published  # random weights compare with nothing
    assert is_torchscript(inception_files.clean)
    assert not is_torchscript(inception_files.torch_fidelity)


def test_a_given_file_of_another_kind_is_named(hub, inception_files) -> None:
    for network, path in (("inception", inception_files.clean), ("inception-clean", inception_files.torch_fidelity)):
        with pytest.raises(UserError) as caught:
            find_weights(network, [path])
        assert f"are not here, and --inception-weights names others: '{path}'." in caught.value.message


def test_an_archive_whose_directory_is_damaged_is_none(hub, tmp_path, inception_files) -> None:
    content = inception_files.clean.read_bytes()
    place = content.rindex(b"PK\x01\x02")  # of its last entry
    path = tmp_path / "damaged.pt"
    path.write_bytes(content[:place] + b"??" + content[place + 2 :])
    with pytest.raises(UserError, match=r"names others: .*damaged.pt'"):
        find_weights("inception-clean", [path])


def test_a_given_file_that_is_not_there(hub, tmp_path) -> None:
    with pytest.raises(UserError, match="no weights file"):
        find_weights("inception", [tmp_path / "absent.pth"])


def test_published_hashes_agree_with_the_names() -> None:
    for name in ("inception", "vgg16"):
        file = module.PUBLISHED[name]
        assert file.sha256[:8] in file.filename  # the libraries put the first eight digits into the name
    assert all(len(file.sha256) == 64 for file in PUBLISHED.values())


def test_urls_are_those_of_the_libraries() -> None:
    from cleanfid.downloads_helper import inception_url
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert PUBLISHED["inception"].url == URL_INCEPTION_V3
    assert PUBLISHED["inception-clean"].url == inception_url


def test_doctor_says_what_runs_and_what_is_missing(hub, inception_files) -> None:
    bare = doctor(Settings())
    assert [name for name, found in bare.items() if found["runs"]] == ["digits"]
    assert "--inception-weights" in bare["adm"]["missing"][0]
    helped = doctor(Settings(inception_weights=(inception_files.torch_fidelity,)))
    assert [name for name, found in helped.items() if found["runs"]] == ["adm", "torch-fidelity", "digits"]
    assert any("vgg16" in missing for missing in helped["torch-fidelity"]["missing"])
    assert not hub.exists()
