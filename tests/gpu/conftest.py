"""Tests of what only a GPU does. They are left out unless they are asked for: `pytest tests/gpu`."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Skip all of this folder on a machine without a GPU, or with it hidden (tests/conftest.py)."""
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and `pytest tests/gpu`"))
