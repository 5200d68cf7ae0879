"""Whether torch.compile can run here, and when it pays: one place for training, sampling and the tokenizer."""

from __future__ import annotations

import shutil

import torch

# Compiling takes about a minute of a CPU or a GPU that would do so much work meanwhile: FLOP, both rounded down.
COMPILE_PAYS_FROM = {"cpu": 5e13, "cuda": 1e16}


def has_compiler(device: torch.device) -> bool:
    """Whether code can be compiled for a device; for a CPU that takes a C++ compiler."""
    return device.type != "cpu" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def compile_pays(flops: float, device: torch.device) -> bool:
    """Whether a job of so many FLOP is worth the time of compiling, and there is a compiler."""
    return has_compiler(device) and flops >= COMPILE_PAYS_FROM.get(device.type, float("inf"))
