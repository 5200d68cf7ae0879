"""Fixtures and helpers that several test folders share."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from xar_cli.config import Config, load_recipe
from xar_cli.model import XAR
from xar_cli.weights import from_published

GOLDEN = Path(__file__).parent / "parity" / "golden"


def pytest_configure(config):
    """Hide the GPUs, unless their tests alone are asked for (`pytest tests/gpu`): all others hold numbers of a CPU."""
    if not all("gpu" in Path(argument.partition("::")[0]).parts for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # two threads of several processes spin against each other


@pytest.fixture(scope="session", autouse=True)
def _signals_as_in_a_terminal():
    """Under `nohup`, or behind a script's `&`, all that is started would ignore them; tests send them."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)  # this process lives on; those that it starts have the default


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """All tensors of golden/xar_tiny.safetensors."""
    with safe_open(GOLDEN / "xar_tiny.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="session")
def golden_settings() -> dict:
    """The settings that the golden numbers were made with."""
    with safe_open(GOLDEN / "xar_tiny.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"])


@pytest.fixture(scope="session")
def golden_config(golden_settings) -> Config:
    """The recipe of the golden model."""
    return load_recipe("base", [f"model.{key}={golden_settings[key]}" for key in ("dim", "depth", "heads")])


@pytest.fixture
def golden_model(golden, golden_config) -> XAR:
    """The golden model with its weights, in eval mode."""
    model = XAR(golden_config)
    state = {name.removeprefix("state."): tensor for name, tensor in golden.items() if name.startswith("state.")}
    model.load_state_dict(from_published(state, golden_config), strict=True)
    return model.eval()
