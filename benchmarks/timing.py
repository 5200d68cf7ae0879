"""How the benchmarks measure: the clock, pairs of runs, the machine and the peak of its matrix products.

Every ratio is of two runs made one after the other (A B B A). A GPU works behind the host's back: wherever one is in
use, the clock is read only after it has finished.
"""

from __future__ import annotations

import argparse
import gc
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from xar_cli.distributed import pick_device

CPU = torch.device("cpu")
CPU_THREADS = 2
PEAK_SHAPES = {  # rows, inner and outer width of matrix products of the model's kind; large ones where it needs them
    "cpu": ((512, 768, 2304), (512, 768, 4096), (512, 2048, 768), (2048, 2048, 2048)),
    "cuda": (
        (16384, 768, 2304), (16384, 768, 4096), (16384, 2048, 768), (16384, 1024, 5504), (16384, 1280, 6912),
        (8192, 8192, 8192),
    ),
}  # fmt: skip
PEAK_CALLS = {"cpu": 1, "cuda": 10}  # in one timing: a product of a GPU is too short to be timed alone
PEAK_TRIES = {"cpu": 12, "cuda": 5}


class Clock:
    """What `seconds` reads: the wall's clock, or the CPU time of this process where other work shares the machine."""

    read: Callable[[], float] = staticmethod(time.perf_counter)


def add_clock_options(parser: argparse.ArgumentParser, device: str = "cpu") -> None:
    """The options that every benchmark of speed has."""
    parser.add_argument("--device", default=device, help=f"auto, cpu, cuda or cuda:N; default: {device}")
    parser.add_argument("--threads", type=int, help=f"default: {CPU_THREADS} on a CPU, torch's own with a GPU")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu needs --threads 1")


def use_clock(options: argparse.Namespace) -> torch.device:
    """Set threads and clock, and give the device.

    The CPU time of several threads that wait for each other means nothing, nor does that of a host beside its GPU.
    """
    device = pick_device(options.device)
    if options.clock == "cpu" and (options.threads != 1 or device.type != "cpu"):
        raise SystemExit("--clock cpu counts the seconds of one thread: give --threads 1, and no GPU.")
    if options.threads is None:
        options.threads = CPU_THREADS if device.type == "cpu" else torch.get_num_threads()
    torch.set_num_threads(options.threads)
    if options.clock == "cpu":
        Clock.read = staticmethod(time.process_time)
    return device


def synchronise() -> None:
    """Wait until the GPU has done all that it was given; nothing where none is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes, with all the work that it leaves to a GPU."""
    synchronise()
    began = Clock.read()
    run()
    synchronise()
    return Clock.read() - began


def pairs(first: Callable[[], object], second: Callable[[], object], count: int) -> list[float]:
    """Ratios first / second, in the order A B B A."""
    ratios = []
    for number in range(count):
        if number % 2:
            after, before = seconds(second), seconds(first)
        else:
            before, after = seconds(first), seconds(second)
        ratios.append(before / after)
    return ratios


class Timed:
    """A call that keeps how long each of its runs took.

    Attributes:
        times: seconds of every run.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self.times: list[float] = []

    def __call__(self) -> None:
        """Run it once."""
        self.times.append(seconds(self._run))

    @property
    def median(self) -> float:
        """Seconds of the run in the middle."""
        return statistics.median(self.times)

    def as_dict(self) -> dict[str, float]:
        """For a report."""
        return {"fastest": min(self.times), "median": self.median, "slowest": max(self.times)}


def spread(ratios: list[float]) -> dict[str, float]:
    """Median, smallest and largest of some ratios."""
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
        "pairs": len(ratios),
    }


def spread_text(found: dict[str, float]) -> str:
    """A spread as people read it."""
    return f"{found['median']:.2f}x ({found['min']:.2f} to {found['max']:.2f})"


def matmul_peak(precision: str, device: torch.device = CPU) -> float:
    """FLOP/s of the best matrix product of the model's kind of shape that this machine gives now."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    calls, best = PEAK_CALLS[device.type], 0.0
    for rows, inner, columns in PEAK_SHAPES[device.type]:
        x = torch.randn(rows, inner, dtype=dtype, device=device)
        weight = torch.randn(columns, inner, dtype=dtype, device=device)

        def multiply(x: torch.Tensor = x, weight: torch.Tensor = weight) -> None:
            for _ in range(calls):
                torch.nn.functional.linear(x, weight)

        multiply()
        fastest = min(seconds(multiply) for _ in range(PEAK_TRIES[device.type]))
        best = max(best, 2 * rows * inner * columns * calls / fastest)
    return best


def machine(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the figures were measured on and with."""
    on_gpu = device.type == "cuda"
    processor = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor,
        "processor": processor,
        "threads": options.threads,
        "clock": options.clock,
        "torch": torch.__version__,
        **({"cuda": torch.version.cuda} if on_gpu else {}),
    }


def forget_peak(device: torch.device) -> None:
    """Give back what is no longer used, and let `peak_memory` begin anew: on a GPU; a CPU's is of the whole process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors held on a GPU since `forget_peak`; on a CPU the most that this process ever held.

    What CUDA graphs use while they run is not among it; `reserved_memory` has it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reserved_memory(device: torch.device) -> dict[str, float]:
    """For a report: the most that torch took of a GPU since `forget_peak`, with the pools of CUDA graphs."""
    return {"reserved_memory_mb": torch.cuda.max_memory_reserved(device) / 1024**2} if device.type == "cuda" else {}


def say(message: str) -> None:
    """Progress, for people; results go to stdout."""
    print(message, file=sys.stderr, flush=True)
