"""The built wheel works away from the checkout, recipes included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The python of a new environment with the wheel installed; third-party packages come from this one's."""
    root = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", root / "dist", CHECKOUT],
        check=True, capture_output=True,
    )  # fmt: skip
    venv.create(root / "venv", with_pip=False)
    python = root / "venv" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = root / "venv" / "lib" / version / "site-packages"
    (wheel,) = (root / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, wheel], check=True)
    # A line of a .pth file adds a folder to the path, without that folder's own .pth files: no editable checkout.
    (packages / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def clean_environment() -> dict[str, str]:
    """This environment without what would lead Python back to a checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def xar(python: Path, *arguments: str) -> str:
    result = subprocess.run(
        [python, "-m", "xar_cli", *arguments],
        capture_output=True, text=True, cwd=python.parent, env=clean_environment(), check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_is_what_runs(python):
    code = "import xar_cli; print(xar_cli.__file__)"
    where = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, cwd=python.parent, env=clean_environment(), check=True
    ).stdout
    assert str(python.parent.parent) in where


def test_recipes_are_inside(python):
    plan = json.loads(xar(python, "train", "--recipe", "huge", "--dry-run", "--json"))
    assert round(plan["parameters"] / 1e6, 1) == 1186.0
    assert plan["num_images"] == 1_281_167
