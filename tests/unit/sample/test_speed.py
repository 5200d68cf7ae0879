"""The line that a number of images per second is told with."""

from __future__ import annotations

import torch

from tests.samples import small_config
from xar_cli.config import load_recipe
from xar_cli.distributed import Ranks
from xar_cli.sample.stage import describe_speed


def test_names_device_dtype_batch_evaluations_and_decoder(monkeypatch):
    """Published: 4 entities of 50 evaluations, null branch for 3 of them, 3 commits in both branches."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card X")
    config = load_recipe("base", ["sample.num_steps=50", "sample.batch_size=128", "sample.decoder_precision=bf16"])
    assert describe_speed(config, Ranks(0, 0, 8, torch.device("cuda", 0))) == (
        "8 x Card X, bf16, batch 128, 356 network evaluations an image (200 with its class, 150 for guidance, "
        "6 for context), decoder in (kl16, bf16)"
    )
    assert describe_speed(small_config(), Ranks(0, 0, 1, torch.device("cpu"))) == (
        "1 x CPU, fp32, batch 7, 20 network evaluations an image (8 with its class, 6 for guidance, "
        "6 for context), decoder in (pixels, fp32)"
    )
