"""The measurements of a GPU are command lines that the benchmarks take, and their results are found again."""

from __future__ import annotations

import importlib

import pytest

from benchmarks import gpu


@pytest.mark.parametrize("measurement", gpu.MEASUREMENTS, ids=lambda one: one.name)
@pytest.mark.parametrize("toy", [False, True], ids=["full", "toy"])
def test_command_lines_are_understood(measurement, toy):
    arguments = measurement.command("cuda", toy)[3:]
    options = importlib.import_module(f"benchmarks.{measurement.benchmark}").parser().parse_args(arguments)
    assert options.device == "cuda"
    assert not toy or options.batch <= 2


def test_names_are_distinct():
    assert len({one.name for one in gpu.MEASUREMENTS}) == len(gpu.MEASUREMENTS)


def test_the_summary_is_found_between_other_lines():
    text = 'compile: 1 s\n{\n  "a": {"b": 1},\n  "summary": "2 images/s"\n}\nWarning: {so long}\n'
    assert gpu.outcome(text, 0) == "2 images/s"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("a\nRuntimeError: b\n", 1, "FAILED with code 1: RuntimeError: b"),
        ("step 1\n", None, "OUT OF TIME: step 1"),
        ("", -9, "FAILED with code -9: it printed nothing"),
        ('{"summary": "2 images/s"}\nSegmentation fault', -11, "FAILED with code -11: Segmentation fault"),
    ],
)
def test_failures_are_told(text, code, said):
    assert gpu.outcome(text, code) == said
