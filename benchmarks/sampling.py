"""Sampling speed against the plain transcription: ratios of pairs in one process, with their spread.

    python -m benchmarks.sampling                     # xAR-B, batch 4, 4 of the 40 steps, two cores: some minutes
    python -m benchmarks.sampling --precision fp32 --pairs 3

Every figure is a ratio of two runs made one after the other (A B B A); median, minimum and maximum are printed, and the
plain code against itself first: that is the noise, and no ratio means more than it allows. Results of both are compared
for the same noise before any speed is printed. On a machine that others use, `--clock cpu --threads 1` counts the
processor seconds of one thread, which other people's work does not lengthen.

`--steps` is the number of evaluations per entity: the published 40 take ten times as long as the default, at nearly the
same ratio. (The plain code carries the finished entity along with each entity's first evaluation, ours keeps it in a
pass of its own; and the table of modulation is filled once. Both weigh less in 40 steps.)
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import plain
from xar_cli.config import Config, load_recipe
from xar_cli.model import XAR
from xar_cli.precision import autocast
from xar_cli.sample.network import SamplingNetwork, prepare_network
from xar_cli.sample.plan import SamplingPlan, flops_per_image
from xar_cli.sample.sampler import sample_latents
from xar_cli.weights import from_published

CPU = torch.device("cpu")
TOLERANCE = {"bf16": 5e-2, "fp32": 1e-3}  # relative distance of the latents of both, for the same noise


class Noise:
    """One draw of noise for both programs, in the form that each wants."""

    def __init__(self, config: Config, batch: int, entities: int, length: int, steps: int) -> None:
        rng = torch.Generator().manual_seed(0)
        shape = (length, config.latent_channels)
        self.initial = torch.randn(batch, entities, *shape, generator=rng)
        self.steps = torch.randn(batch, entities, steps - 1, *shape, generator=rng)

    def draw(self, entity: int, length: int, draws: int) -> Tensor:
        """For the sampler: (draws, B, L, C)."""
        return torch.cat([self.initial[None, :, entity], self.steps[:, entity].transpose(0, 1)])[:draws]


def build_pair(config: Config) -> tuple[plain.PlainXAR, dict[str, Tensor]]:
    """The plain network with seeded weights of unit gain, and the same weights under our names."""
    torch.manual_seed(0)
    network = plain.PlainXAR(config.model.dim, config.model.depth, config.model.heads).eval()
    return network, dict(from_published(network.state_dict(), config))


def build_ours(
    config: Config, state: dict[str, Tensor], precision: str, compiled: bool, packed: bool = True
) -> SamplingNetwork:
    """Our network with these weights, ready for sampling."""
    model = XAR(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    return prepare_network(model.eval(), precision, compiled, packed)


class Clock:
    """What `seconds` reads: the wall's clock, or the CPU time of this process where other work shares the machine."""

    read: Callable[[], float] = staticmethod(time.perf_counter)


def seconds(run: Callable[[], object]) -> float:
    began = Clock.read()
    run()
    return Clock.read() - began


def add_clock_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu needs --threads 1")


def use_clock(options: argparse.Namespace) -> None:
    """Set threads and clock; the CPU time of several threads that wait for each other means nothing."""
    if options.clock == "cpu" and options.threads != 1:
        raise SystemExit("--clock cpu counts the seconds of one thread: give --threads 1.")
    torch.set_num_threads(options.threads)
    if options.clock == "cpu":
        Clock.read = staticmethod(time.process_time)


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


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3)}


def matmul_peak(precision: str) -> float:
    """FLOP/s of the best matrix product of the model's kind of shape that this machine gives now."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for rows, inner, columns in ((512, 768, 2304), (512, 768, 4096), (512, 2048, 768), (2048, 2048, 2048)):
        x, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
        fastest = min(seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight)) for _ in range(12))
        best = max(best, 2 * rows * inner * columns / fastest)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="base")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    add_clock_options(parser)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--plain-precision", choices=["bf16", "fp32"], help="default: the same")
    options = parser.parse_args()
    use_clock(options)
    config = load_recipe(options.recipe, [f"sample.num_steps={options.steps}"])
    plan = SamplingPlan.of(config)
    plain_precision = options.plain_precision or options.precision

    network, state = build_pair(config)
    ours = build_ours(config, state, options.precision, not options.no_compile)
    noise = Noise(config, options.batch, network.num_entities, network.length, options.steps)
    labels = torch.arange(options.batch) * 37 % config.data.num_classes

    def run_plain() -> Tensor:
        with autocast(plain_precision, CPU):
            return plain.sample(
                network, labels, noise.initial, noise.steps, options.steps, config.sample.guidance_scale
            )

    def run_ours() -> Tensor:
        with autocast(options.precision, CPU):
            return sample_latents(ours, labels, noise, plan)

    began = time.perf_counter()
    run_ours()
    warm_up = time.perf_counter() - began
    expected, found = run_plain(), run_ours()
    error = ((found - expected).norm() / expected.norm()).item()
    if error > TOLERANCE[options.precision]:
        raise SystemExit(f"The results differ by {error:.2e}: no speed is printed.")
    noise_floor = pairs(run_plain, run_plain, 1)
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    ratios = pairs(
        lambda: times["plain"].append(seconds(run_plain)),
        lambda: times["ours"].append(seconds(run_ours)),
        options.pairs,
    )
    peak, work = matmul_peak(options.precision), flops_per_image(config, plan) * options.batch
    print(json.dumps({
        "machine": platform.processor() or platform.machine(), "threads": options.threads, "clock": options.clock,
        "torch": torch.__version__,
        "recipe": options.recipe, "batch": options.batch, "steps_per_entity": options.steps,
        "precision": options.precision, "plain_precision": plain_precision, "compiled": not options.no_compile,
        "relative_difference": error,
        "plain_against_itself": spread(noise_floor),
        "plain_time_over_ours": spread(ratios),
        "seconds": {name: {"fastest": min(found), "median": statistics.median(found)} for name, found in times.items()},
        "first_run_with_compilation_seconds": warm_up,
        "teraflop_per_image": work / options.batch / 1e12,
        "matmul_peak_gigaflops": peak / 1e9,
        "share_of_peak": work / statistics.median(times["ours"]) / peak,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
