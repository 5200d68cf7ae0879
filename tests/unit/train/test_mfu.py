"""Model FLOPs utilisation: right where the device is known, absent where it is not."""

from types import SimpleNamespace

import pytest
import torch

from tests.runs import small_recipe
from xar_cli.config import load_recipe
from xar_cli.distributed import Ranks
from xar_cli.logs import Progress
from xar_cli.train import loop
from xar_cli.train.cost import peak_flops
from xar_cli.train.plan import make_plan

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.5e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "fp16", 835e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40", "bf16", None),  # neither an L4 nor an L40S
        ("NVIDIA A10G", "bf16", None),  # no A10
        ("NVIDIA GeForce RTX 4090", "bf16", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", None),
    ],
)
def test_peaks_of_devices(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, precision) == peak


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu"), "bf16") is None


def logged(config, device, rate, world_size=1):
    """The record and the progress line of a step at so many images per second."""
    plan, written = make_plan(config, world_size, config.data.num_images), []
    record = {
        "step": 10, "loss": 0.5, "lr": 1e-4, "grad_norm": 1.0, "images_per_second": rate, "bad_steps_in_a_row": 0,
    }  # fmt: skip
    window = SimpleNamespace(read=lambda step, images: (dict(record), []))
    bar = Progress(plan.total_steps, "train", "step", enabled=False)
    state = SimpleNamespace(step=10, config=config, loss_scale=None)
    ranks = Ranks(0, 0, world_size, device)
    loop._log(state, plan, None, ranks, window, SimpleNamespace(write=written.append), bar)
    return plan, written[0], bar.line()


def test_record_and_progress_line_of_a_known_device(monkeypatch):
    """xAR-B costs 182 GFLOP an image: 16,000 of them a second on eight H100 are 36.8 % of 8 x 989 TFLOP/s."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    plan, record, line = logged(load_recipe("base"), CUDA, rate=16000.0, world_size=8)
    assert record["mfu"] == pytest.approx(16000 * plan.flops_per_image / (8 * 989e12))
    assert record["mfu"] == pytest.approx(0.368, abs=0.002)
    assert " mfu=37%" in line
    assert " images_per_second=16000" in line
    assert record["seconds_left"] == pytest.approx((plan.total_steps - 10) * 2048 / 16000)


@pytest.mark.parametrize("name", ["NVIDIA Mystery 9000", None])
def test_nothing_is_claimed_for_an_unknown_device(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    _, record, line = logged(small_recipe(), CUDA if name else torch.device("cpu"), rate=100.0)
    assert record["mfu"] is None
    assert "mfu" not in line
