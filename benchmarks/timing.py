"""How the benchmarks measure: the clock, pairs of runs, the machine and the peak of its matrix products.

Every ratio is of two runs made one after the other (A B B A). A GPU works behind the host's back: wherever one is in
use, the clock is read only after it has finished. Also what their command lines have in common.
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xar_cli.config import Config, load_recipe
from xar_cli.distributed import pick_device
from xar_cli.errors import UserError

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


def positive(text: str) -> int:
    """A count on the command line: 1 or more."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of 1 or more")
    return int(text)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Have what a person can mend end a benchmark with a sentence, not a traceback."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except UserError as error:
            say(str(error))
            raise SystemExit(error.exit_code) from None

    return run


def recipe_with(recipe: str, overrides: Sequence[str], own: Sequence[str]) -> Config:
    """A recipe with a person's `--set`, and with what the benchmark sets by its own options.

    Raises:
        UserError: the person sets what the benchmark would report otherwise.
    """
    owned = {one.partition("=")[0] for one in own}
    for key in (one.partition("=")[0].strip() for one in overrides):
        if key in owned:
            raise UserError(f"'--set {key}' is for an option of this benchmark to say.", "See --help.")
    return load_recipe(recipe, [*overrides, *own])


def require_agreement(what: str, difference: float, tolerance: float) -> None:
    """End the benchmark, before it prints any speed, where two programs do not give the same."""
    if not difference <= tolerance:
        raise SystemExit(f"{what} differ by {difference:.1e}, more than {tolerance:g}: no speed is printed.")


def distance(ours: Sequence[Tensor] | Tensor, theirs: Sequence[Tensor] | Tensor) -> float:
    """|ours - theirs| / |theirs|, of all their values together, taken in float64."""

    def norm(tensors: Sequence[Tensor]) -> float:
        return float(sum(tensor.double().square().sum() for tensor in tensors)) ** 0.5

    pair = [[tensors] if isinstance(tensors, Tensor) else list(tensors) for tensors in (ours, theirs)]
    return norm([a.double() - b.double() for a, b in zip(*pair, strict=True)]) / norm(pair[1])


def add_clock_options(parser: argparse.ArgumentParser, device: str = "cpu") -> None:
    """The options that every benchmark of speed has."""
    parser.add_argument("--device", default=device, help=f"auto, cpu, cuda or cuda:N; default: {device}")
    parser.add_argument("--threads", type=positive, help=f"default: {CPU_THREADS} on a CPU, torch's own with a GPU")
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


def in_turns(
    first: Callable[[], float], second: Callable[[], float], count: int, with_cpu: bool = False
) -> dict[str, float]:
    """Ratios of two rates, which the calls measure themselves, in the order A B B A; and the rates.

    With `cpu_ratio`: the same by processor time of all threads of this process, which is free of what else the machine
    does; where the processor is the device, both tend to the same.
    """
    ratios, cpu_ratios = [], []
    rates: tuple[list[float], list[float]] = ([], [])
    for turn in range(count):
        order = (first, second) if turn % 2 == 0 else (second, first)
        got = []
        for run in order:
            before = time.process_time()
            rate = run()
            got.append((rate, time.process_time() - before))
        (a, a_cpu), (b, b_cpu) = got if turn % 2 == 0 else got[::-1]
        ratios.append(a / b)
        cpu_ratios.append(b_cpu / a_cpu)
        rates[0].append(a)
        rates[1].append(b)
    found = {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "pairs": count}
    if with_cpu:
        cpu = {"cpu_ratio": statistics.median(cpu_ratios), "cpu_min": min(cpu_ratios), "cpu_max": max(cpu_ratios)}
        found |= cpu
    return found | {"rate": statistics.median(rates[0]), "against_rate": statistics.median(rates[1])}


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
    """What the figures were measured on, with and when."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "processor": processor(),
        "threads": options.threads,
        "clock": options.clock,
        "torch": torch.__version__,
        **({"cuda": torch.version.cuda} if on_gpu else {}),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The CPU's name and which of the instructions it has that decide the speed of matrix products."""
    facts = Path("/proc/cpuinfo")
    if not facts.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in facts.read_text().splitlines())
    first: dict[str, str] = {}
    for key, _, value in lines:
        first.setdefault(key.strip(), value.strip())
    has = first.get("flags", "").split()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in has]
    return f"{first.get('model name', platform.machine())} ({', '.join(known)})"


def commit() -> str:
    """The commit of this code, and whether it was changed; empty outside a repository."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(
        describe, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    return done.stdout.strip()


def forget_peak(device: torch.device) -> None:
    """Give back what is no longer used, and let `peak_memory` begin anew: on a GPU; a CPU's is of the whole process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """For a report: the most that tensors held on a GPU since `forget_peak`, and that torch took of it, with the pools
    of CUDA graphs; on a CPU the most that this process ever held.
    """
    if device.type != "cuda":
        return {"process_peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    taken = {"peak": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return {f"{name}_memory_mb": taken_bytes / 1024**2 for name, taken_bytes in taken.items()}


def say(message: str) -> None:
    """Progress, for people; results go to stdout."""
    print(message, file=sys.stderr, flush=True)
