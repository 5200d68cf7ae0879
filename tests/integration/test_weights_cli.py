"""`xar weights`, as typed: info, convert, download and push; the last two against a hub on loopback."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fake_hub import FakeHub, running_hub
from xar_cli.cli.app import main
from xar_cli.hub import PUBLISHED, sha256_of

pytest_plugins = ["tests.weight_files"]


@pytest.fixture
def xar(capsys):
    """Run `xar` in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leave:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(leave.value.code or 0), out, err

    return call


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


def xar_process(hub: FakeHub, cache: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `xar` in a process of its own, with the hub on loopback."""
    return subprocess.run(
        [sys.executable, "-m", "xar_cli", *map(str, arguments)],
        env=hub.environment(cache) | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_info_says_what_a_file_is(xar, training_file, recipe_file):
    code, out, _ = xar("weights", "info", training_file, "--recipe", recipe_file, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["dim"], facts["depth"], facts["heads"], facts["tokens"], facts["classes"]) == (32, 2, 2, 256, 1000)
    assert (facts["kind"], facts["epoch"], facts["layout"], facts["dtypes"]) == ("ema", 399, "published", ["float32"])
    assert facts["parameters"] == sum(
        tensor.numel() for tensor in torch.load(training_file, weights_only=False)["model"].values()
    )
    assert facts["sha256"] == sha256_of(training_file)


def test_info_of_a_network_that_no_recipe_has_tells_its_shapes(xar, bare_file):
    code, out, _ = xar("weights", "info", bare_file, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["recipe"], facts["fits"], facts["dim"], facts["heads"]) == (None, [], 32, 2)


def test_info_of_a_tokenizer(xar, tmp_path):
    from tests.seeded import kl16_shapes

    torch.save({"model": {k: torch.zeros(1).expand(s) for k, s in kl16_shapes().items()}}, tmp_path / "kl16.ckpt")
    code, out, _ = xar("weights", "info", tmp_path / "kl16.ckpt", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["architecture"] == "KL-16 tokenizer"
    assert facts["parameters"] == 66_456_019
    assert facts["identity"].startswith("kl16:")


def test_info_for_people(xar, run_folder):
    code, out, _ = xar("weights", "info", run_folder)
    assert code == 0
    assert "step" in out
    assert "1234" in out


def test_convert_there_and_back(xar, run_folder, published, tmp_path):
    assert xar("weights", "convert", run_folder, tmp_path / "ema.safetensors")[0] == 0
    code, out, _ = xar("weights", "convert", tmp_path / "ema.safetensors", tmp_path / "ema.pth", "--json")
    assert code == 0
    assert json.loads(out)["layout"] == "published"
    state = torch.load(tmp_path / "ema.pth", weights_only=True)
    assert all(torch.equal(state[name], tensor + 1) for name, tensor in published.items())
    assert xar("weights", "convert", run_folder, tmp_path / "raw.pth", "--raw")[0] == 0
    raw = torch.load(tmp_path / "raw.pth", weights_only=True)
    assert all(torch.equal(raw[name], tensor) for name, tensor in published.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "none.pth"], "There is no file 'none.pth'"),
        (["info", "FILE", "--recipe", "large"], "recipe 'large' asks for"),
        (["convert", "FILE", "out.pth", "--recipe", "lagre"], "Did you mean 'large'"),
        (["convert", "FILE", "out.txt", "--recipe", "RECIPE"], "no suffix that tells the format"),
        (["download", "bsae"], "Did you mean 'base'"),
        (["push", "FILE", "name-alone"], "is not a repository"),
        (["push", "FILE", "a/b", "--results", "none.json"], "Cannot read the results"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(xar, bare_file, recipe_file, arguments, said):
    replaced = {"FILE": bare_file, "RECIPE": recipe_file}
    code, out, err = xar("weights", *(replaced.get(argument, argument) for argument in arguments))
    assert code == 2
    assert out == ""
    assert said in err


def test_download_says_what_it_is_about_to_do_and_checks_what_came(hub, tmp_path):
    file = PUBLISHED["base"].file
    hub.add(file.repo, file.filename, b"the weights of base")
    asked = xar_process(hub, tmp_path, "weights", "download", "base")
    assert asked.returncode == 2
    assert "--yes" in asked.stderr
    assert hub.gets() == []
    done = xar_process(hub, tmp_path, "weights", "download", "base", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["file"]).read_bytes() == b"the weights of base"
    assert json.loads(done.stdout)["sha256_checked"] is True
    for text in ("hf://OliverRen/xAR/xAR-B.pth", "19 B", "licence", "none"):
        assert text in done.stderr


def test_a_download_that_is_not_agreed_to_is_none(xar, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("xar_cli.hub.remote_facts", lambda *_: (19, None))
    monkeypatch.setattr("xar_cli.hub.fetch", lambda *_: pytest.fail("fetched all the same"))
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    code, out, err = xar("weights", "download", "base")
    assert (code, out.strip()) == (1, "")
    assert err.endswith("Not downloaded.\n")


def test_a_download_that_the_disk_has_no_room_for_is_refused_first(xar, monkeypatch):
    monkeypatch.setattr("xar_cli.hub.remote_facts", lambda *_: (10**18, None))
    monkeypatch.setattr("xar_cli.hub.cached", lambda *_: None)
    monkeypatch.setattr("xar_cli.hub.fetch", lambda *_: pytest.fail("fetched all the same"))
    code, _, err = xar("weights", "download", "base", "--yes")
    assert code == 2
    assert "Not enough disk space for the hub's cache (HF_HOME)" in " ".join(err.split())


def test_download_refuses_what_is_not_what_the_hub_records(hub, tmp_path):
    file = PUBLISHED["base"].file
    hub.add(file.repo, file.filename, b"the weights of base")
    path = Path(xar_process(hub, tmp_path, "weights", "download", "base", "--yes").stdout.strip())
    path.write_bytes(b"the weights 0f base")
    again = xar_process(hub, tmp_path, "weights", "download", "base", "--yes")
    assert again.returncode == 1
    assert "was removed: the same command fetches it again" in " ".join(again.stderr.split())
    once_more = xar_process(hub, tmp_path, "weights", "download", "base", "--yes")
    assert Path(once_more.stdout.strip()).read_bytes() == b"the weights of base"


def test_a_download_that_is_there_needs_no_hub(hub, tmp_path):
    file = PUBLISHED["base"].file
    hub.add(file.repo, file.filename, b"the weights of base")
    first = xar_process(hub, tmp_path, "weights", "download", "base", "--yes")
    offline = xar_process(hub, tmp_path, "weights", "download", "base", "--yes", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == first.stdout
    Path(first.stdout.strip()).write_bytes(b"the weights 0f base")
    damaged = xar_process(hub, tmp_path, "weights", "download", "base", "--yes", HF_HUB_OFFLINE="1")
    assert damaged.returncode == 1
    assert "was damaged" in damaged.stderr


def test_a_pushed_run_can_be_used_by_its_name_on_the_hub(hub, run_folder, tmp_path):
    results = tmp_path / "fid.json"
    metrics = {"fid": {"name": "FID", "value": 2.5, "error": None}}
    measured = {"samples": {"count": 50000}, "reference": {"name": "r256", "sha256": "ab" * 32}}
    results.write_text(json.dumps({**measured, "protocols": {"adm": {"metrics": metrics}}}))
    push = ("weights", "push", run_folder, "me/mine", "--results", results, "--json", "--private")
    pushed = xar_process(hub, tmp_path / "a", *push)
    assert pushed.returncode == 0, pushed.stderr
    assert hub.private == {"me/mine"}
    assert json.loads(pushed.stdout)["address"] == f"{hub.address}/me/mine"
    card = hub.files["me/mine", "main", "README.md"].decode()
    assert "| FID | 2.5 | adm | 50000 | r256 (sha256 abababababab) |" in card
    assert ("me/mine", "main", "recipe.yaml") in hub.files
    info = xar_process(hub, tmp_path / "b", "weights", "info", "hf://me/mine/model.safetensors@main", "--json")
    assert info.returncode == 0, info.stderr
    assert json.loads(info.stdout)["step"] == 1234


def test_a_hub_that_cannot_be_reached_is_a_sentence(hub, run_folder, tmp_path):
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        hub.address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for command in (("download", "base", "--yes"), ("push", run_folder, "me/mine")):
            done = xar_process(hub, tmp_path, "weights", *command)
            assert done.returncode == 1, command
            assert "Traceback" not in done.stderr
            assert "refused" in done.stderr
            assert "next: Check the connection and try again" in " ".join(done.stderr.split())


def test_a_push_can_be_looked_at_first(xar, run_folder):
    code, out, _ = xar("weights", "push", run_folder, "me/mine", "--dry-run")
    assert code == 0
    assert "# mine" in out
    code, as_json, _ = xar("weights", "push", run_folder, "me/mine", "--dry-run", "--json")
    assert json.loads(as_json) == {"card": out}
