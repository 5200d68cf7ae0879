"""The house holds: imports run one way, every config field is read, torch stays out of the command line's start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

import xar_cli
from xar_cli.config import schema
from xar_cli.config.schema import Config

PACKAGE = Path(xar_cli.__file__).parent
ORDER = [
    {"errors", "logs", "run_dir"},
    {"config"},
    {"distributed", "precision", "compiler", "device_memory", "tensor_files", "hub", "lock", "stopping"},
    {"data", "tokenizer"},
    {"model"},
    {"flow"},
    {"checkpoint", "weights"},
    {"cache", "train", "sample", "evaluate"},
    {"launch"},
    {"quickstart", "score_run"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# Modules of one level do not import each other, but for these.
SIDEWAYS = {("logs", "errors"), ("run_dir", "errors"), ("tensor_files", "hub"), ("weights", "checkpoint")}
# The one place where a stage calls others: training's preview and FID.
EXCEPTIONS = {("train/preview.py", "sample"), ("train/preview.py", "evaluate")}
FORBIDDEN_FOLDERS = {"utils", "misc", "common", "engine"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported_parts(path: Path) -> set[str]:
    """First-level parts of the package that a file imports, anywhere in it."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "xar_cli" and len(pieces) > 1 and pieces[1] in LEVEL:
                parts.add(pieces[1])
    return parts


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    relative = path.relative_to(PACKAGE).as_posix()
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    assert own in LEVEL, f"{own} has no place in the import order"
    for other in imported_parts(path) - {own}:
        if (relative, other) in EXCEPTIONS:
            continue
        allowed = LEVEL[other] < LEVEL[own] or (own, other) in SIDEWAYS
        assert allowed, f"{relative} imports {other}, which stands above or beside {own}"


def test_design_md_tells_the_same_order():
    text = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    sentence = text.partition("Imports run one way")[2].partition("`.\n")[0]
    assert [set(part.replace("`", "").split()) for part in sentence.partition(":\n")[2].split("→")] == ORDER


def test_no_folder_for_leftovers():
    names = {path.name for path in PACKAGE.rglob("*") if path.is_dir()} | {path.stem for path in sources()}
    assert not names & FORBIDDEN_FOLDERS


def fields_of(model: type[BaseModel]) -> set[str]:
    return {name for name in model.model_fields}


def test_every_config_field_is_read():
    sections = [
        value
        for value in vars(schema).values()
        if isinstance(value, type) and issubclass(value, schema.Section) and value is not schema.Section
    ]
    assert Config in sections
    read = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    unread = {f"{section.__name__}.{name}" for section in sections for name in fields_of(section) if name not in read}
    assert not unread


def test_command_line_starts_without_heavy_imports():
    heavy = ("torch", "numpy", "h5py", "PIL", "matplotlib")
    code = f"import sys, xar_cli.cli.app; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_model_and_flow_know_no_device_and_no_process_group():
    for path in [*(PACKAGE / "model").glob("*.py"), *(PACKAGE / "flow").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert ".cuda(" not in text
        assert "distributed" not in text
