"""torch.compile of the transformer blocks, and what to do where no compiler is installed."""

from __future__ import annotations

import shutil

from xar_cli.logs import log
from xar_cli.model import XAR


def compile_blocks(model: XAR) -> None:
    """Compile every block in place: one graph serves all layers. Without a C++ compiler the blocks stay eager."""
    on_cpu = model.rope.device.type == "cpu"
    if on_cpu and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        log.warning("No C++ compiler is installed: training runs uncompiled, which is slower.")
        return
    for block in model.blocks:
        block.compile()
