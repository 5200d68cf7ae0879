"""The `xar` program itself: help, version, errors and their exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from xar_cli import __version__
from xar_cli.cli import app as app_module
from xar_cli.cli.app import main
from xar_cli.cli.printing import print_rows
from xar_cli.config import list_recipes
from xar_cli.errors import UserError


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"xar {__version__}\n", "")


@pytest.mark.parametrize("command", ["quickstart", "cache-latents", "train", "sample", "fid", "recipes"])
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "Usage: xar " + command in out


def option_help(*words: str) -> dict[str, str]:
    """What `--help` says of every option of a command, as it stands in the code: not wrapped."""
    command = typer.main.get_command(app_module.app)
    for word in words:
        command = command.commands[word]
    return {parameter.opts[0]: parameter.help or "" for parameter in command.params}


def test_help_tells_the_default_that_is_taken():
    assert "with --run evaluate.count" in option_help("fid")["--count"]
    assert not [text for option, text in option_help("fid", "stats").items() if "--run" in text]
    assert "./samples" in option_help("sample")["--out"]


def test_unknown_command_and_option_exit_with_2(capsys):
    code, _, err = run(capsys, "trian")
    assert code == 2
    assert "No such command" in err
    assert run(capsys, "train", "--recpie", "base")[0] == 2


def test_a_table_shows_brackets_and_colons_as_they_are(capsys):
    row = ("/data/[red]set[/wrong]/[0]", ":smile: " + 300 * "x")
    print_rows([row], ("path", "what"))
    assert "  ".join(row) in capsys.readouterr().out


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", ["list", "show tiny", "--help"])
@pytest.mark.parametrize(
    ("stdout", "code", "words"),
    [(">&-", 0, ""), (">/dev/full", 1, "error: The result cannot be printed: No space left on device.\n  next: ")],
)
def test_a_stdout_that_takes_nothing(monkeypatch, command, stdout, code, words, buffered):
    if "full" in stdout and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setenv("PYTHONUNBUFFERED", "" if buffered else "1")
    line = f'"{sys.executable}" -m xar_cli recipes {command} {stdout}'
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(words)
    assert len(done.stderr.splitlines()) == len(words.splitlines())


def test_an_error_of_the_system_that_is_not_of_stdout_keeps_its_traceback(capsys, monkeypatch):
    def failed(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(app_module, "app", failed)
    with pytest.raises(OSError, match="No space left"):
        main([])


def test_the_list_of_recipes_has_a_line_for_each(capsys):
    _, out, _ = run(capsys, "recipes", "list")
    assert len(out.splitlines()) == 1 + len(list_recipes())


@pytest.mark.parametrize(
    ("arguments", "option", "word"),
    [
        (("fid", "--image-size", "256", "stats", "images", "-o", "ref.npz"), "--image-size", "stats"),
        (("fid", "--workers", "4", "doctor"), "--workers", "doctor"),  # its default, but said
        (("cache-latents", "--recipe", "tiny", "verify", "latents.h5"), "--recipe", "verify"),
    ],
)
def test_an_option_before_a_subcommand_is_refused(capsys, arguments, option, word):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert f"Write {option} after `{word}`." in err


def test_recipes_list_show_validate(capsys):
    code, out, _ = run(capsys, "recipes", "list")
    assert code == 0
    assert all(name in out for name in ("tiny", "base", "large", "huge"))
    code, out, _ = run(capsys, "recipes", "show", "huge", "--set", "train.epochs=400")
    assert code == 0
    assert "epochs: 400.0" in out
    assert run(capsys, "recipes", "validate", "base")[0] == 0
    assert run(capsys, "recipes", "schema")[0] == 0
    code, _, err = run(capsys, "recipes", "validate", "base", "--set", "train.epohcs=400")
    assert code == 2
    assert "did you mean 'epochs'" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("train", "--recipe", "hug", "--dry-run"),
        ("train", "--recipe", "tiny"),
        ("train", "--recipe", "tiny", "--data", "missing.h5"),
        ("train", "--recipe", "huge", "--dry-run", "--nproc-per-node", "3"),
        ("train", "--recipe", "huge", "--dry-run", "--nnodes", "2"),
        ("sample",),
        ("sample", "--run", "missing"),
        ("fid", "--samples", "missing", "--reference", "missing", "--protocol", "digits"),
        ("cache-latents", "--images", "missing", "--out", "x.h5", "--recipe", "tiny"),
    ],
)
def test_bad_input_is_a_sentence_a_next_step_and_exit_code_2(capsys, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert "\n  next: " in err
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan_of_the_whole_of_imagenet(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(
        capsys, "train", "--recipe", "huge", "--dry-run", "--nproc-per-node", "8", "--nnodes", "8",
        "--rdzv-endpoint", "node0:29500",
    )  # fmt: skip
    assert code == 0
    assert "1186.0 M" in out
    assert "1,281,167 images" in out
    assert "2048 = 64 ranks x 2 accumulation x 16 images" in out
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_130_and_a_user_error_keeps_its_code(capsys, monkeypatch):
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    for stopped in (interrupted, lambda **_: 130):
        monkeypatch.setattr(app_module, "app", stopped)
        code, _, err = run(capsys)
        assert code == 130
        assert "Stopped by Ctrl-C" in err

    def failed(**_: object) -> None:
        raise UserError("The disk is full.", "Free some space.", exit_code=1)

    monkeypatch.setattr(app_module, "app", failed)
    assert run(capsys) == (1, "", "error: The disk is full.\n  next: Free some space.\n")
