"""All measurements of a GPU, one after the other, each in a process of its own with a time limit.

    python -m benchmarks.gpu --out results                  # all: about a quarter of an hour on an H100
    python -m benchmarks.gpu --out results --only sampling-base training-base
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --out results --toy --only attention     # on a CPU, tiny: does it run at all?

The most important come first. One that fails or runs out of time does not stop the others. As each ends, its line is
printed: seconds, what it found, or the last line of its error; all that it printed is in `NAME.txt`. They share one
folder of compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ("--set", "model.dim=64", "--set", "model.depth=1", "--set", "model.heads=2")
TOY = {  # what makes a measurement a matter of seconds on a CPU; the last of an option given twice counts
    "sampling": ("--recipe", "base", *NETWORK, "--batch", "1", "--steps", "2", "--pairs", "1", "--repeats", "1"),
    "training": ("--recipe", "base", *NETWORK, "--batch", "2", "--steps", "1", "--pairs", "1"),
    "attention": ("--batch", "1", "--pairs", "1"),
    "decoder": ("--batch", "1", "--pairs", "1"),
    "loop": ("--recipe", "base", *NETWORK, "--batch", "2", "--steps", "60", "--pairs", "1"),
}


@dataclass(frozen=True)
class Measurement:
    """One command line.

    Attributes:
        name: what it is called here.
        benchmark: module of this folder.
        arguments: of its command line, device left out.
        limit: seconds after which it is stopped.
    """

    name: str
    benchmark: str
    arguments: tuple[str, ...]
    limit: int

    def command(self, device: str, toy: bool) -> list[str]:
        """What to run."""
        extra = TOY[self.benchmark] if toy else ()
        return [sys.executable, "-m", f"benchmarks.{self.benchmark}", *self.arguments, "--device", device, *extra]


def _measurement(name: str, limit: int, line: str) -> Measurement:
    benchmark, *arguments = line.split()
    return Measurement(name, benchmark, tuple(arguments), limit)


MEASUREMENTS = (
    _measurement("sampling-base", 180, "sampling --batch 128 --steps 8 --decoder --pairs 5"),
    _measurement("training-base", 150, "training --batch 64 --pairs 5"),
    _measurement("sampling-base-published", 180, "sampling --batch 128 --steps 40 --decoder --no-plain --repeats 3"),
    _measurement("latency-base", 180, "sampling --batch 1 --steps 40 --decoder --no-plain --repeats 7"),
    _measurement("decoder", 300, "decoder --encoder --batch 64 --pairs 5"),
    _measurement(
        "sampling-large", 180, "sampling --recipe large --batch 128 --steps 10 --decoder --no-plain --repeats 3"
    ),
    _measurement("training-large", 120, "training --recipe large --batch 64 --no-plain --pairs 3"),
    _measurement("sampling-huge", 180, "sampling --recipe huge --batch 128 --steps 10 --decoder --no-plain"),
    _measurement("training-huge", 150, "training --recipe huge --batch 64 --no-plain --pairs 3"),
    _measurement("attention", 60, "attention --precision bf16 --pairs 5"),
    _measurement("attention-dropout", 60, "attention --precision bf16 --dropout 0.1 --pairs 5"),
    _measurement("attention-compiled", 120, "attention --precision bf16 --dropout 0.1 --pairs 5 --compile"),
    _measurement("loop", 180, "loop --batch 64 --pairs 1 --json"),
    _measurement("latency-large", 90, "sampling --recipe large --batch 1 --steps 50 --no-plain --repeats 5"),
    _measurement("latency-huge", 90, "sampling --recipe huge --batch 1 --steps 50 --no-plain --repeats 5"),
    _measurement("training-huge-32", 150, "training --recipe huge --batch 32 --no-plain --pairs 3"),
)


def result_in(text: str) -> dict[str, Any] | None:
    """The last JSON object that begins a line of what a benchmark printed; None where there is none."""
    place = text.rfind("\n{")
    start = place + 1 if place >= 0 else 0 if text.startswith("{") else -1
    if start < 0:
        return None
    try:
        return dict(json.JSONDecoder().raw_decode(text, start)[0])
    except ValueError:
        return None


def outcome(text: str, code: int | None) -> str:
    """What to say of a measurement that printed this and ended with this code; None stands for the time limit."""
    result = result_in(text)
    if code == 0 and result is not None:
        return str(result.get("summary", "done"))
    lines = text.strip().splitlines() or ["it printed nothing"]
    return f"{'OUT OF TIME' if code is None else f'FAILED with code {code}'}: {lines[-1]}"


def run(measurement: Measurement, device: str, toy: bool, out: Path, kernels: Path) -> bool:
    """Run one and print its line; whether it gave a result."""
    command, began = measurement.command(device, toy), time.monotonic()
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(kernels), "PYTHONUNBUFFERED": "1"}
    path = out / f"{measurement.name}.txt"
    code: int | None = None
    with path.open("w", encoding="utf-8") as file:  # no pipe: a process that outlives a benchmark would hold it
        print("$", " ".join(command[1:]), file=file, flush=True)
        with suppress(subprocess.TimeoutExpired):
            code = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=measurement.limit, check=False,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
    text = path.read_text(encoding="utf-8", errors="replace")
    print(f"{measurement.name} ({time.monotonic() - began:.0f} s): {outcome(text, code)}", flush=True)
    return code == 0 and result_in(text) is not None


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for what the measurements print")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[one.name for one in MEASUREMENTS])
    parser.add_argument("--list", action="store_true", help="print the command lines and end")
    parser.add_argument("--device", help="default: cuda; with --toy cpu")
    parser.add_argument("--toy", action="store_true", help="tiny networks and batches: whether all runs, not how fast")
    parser.add_argument(
        "--kernels", type=Path, default=Path(tempfile.gettempdir()) / "xar-kernels", help="folder for compiled kernels"
    )
    return parser


def main() -> None:
    options = parser().parse_args()
    device = options.device or ("cpu" if options.toy else "cuda")
    chosen = [one for one in MEASUREMENTS if options.only is None or one.name in options.only]
    if options.list:
        for one in chosen:
            print(f"{one.name} (at most {one.limit} s): {' '.join(one.command(device, options.toy)[1:])}")
        return
    if options.out is None:
        raise SystemExit("Give --out: the folder for what the measurements print.")
    options.out.mkdir(parents=True, exist_ok=True)
    given = [run(one, device, options.toy, options.out, options.kernels) for one in chosen]
    if not all(given):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
