"""Training-step speed against the plain transcription: ratios of pairs in one process, with their spread.

    python -m benchmarks.training                              # xAR-B, batch 8, two cores: some minutes
    python -m benchmarks.training --device cuda                # batch 64, five steps a timing
    python -m benchmarks.training --device cuda --recipe large --no-plain     # ours alone

Plain is the paper's arithmetic as eager code (benchmarks/plain.py): per-token modulation, dense mask, unfused AdamW (on
a GPU by torch's default, over all tensors at once), one EMA update per parameter and `loss.item()` every step. Ours is
the step of `xar train`, compiled. Every ratio is of two runs made one after the other (A B B A); median, minimum and
maximum are printed, the plain code against itself first: that is the noise. Losses of both are compared for the same
weights and draws before any speed is printed; with `--no-plain` they are not, and ours is timed alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain, timing
from benchmarks.timing import Timed, pairs, say, seconds, spread, spread_text
from xar_cli.config import Config, load_recipe
from xar_cli.distributed import Ranks
from xar_cli.model import build_grouping
from xar_cli.precision import autocast
from xar_cli.tokenizer.codec import sample_latents
from xar_cli.train.draws import draw_step
from xar_cli.train.objective import batch_loss
from xar_cli.train.plan import make_plan
from xar_cli.train.state import TrainState
from xar_cli.train.step import take_step
from xar_cli.train.window import Window
from xar_cli.weights import from_published

BATCH = {"cpu": 8, "cuda": 64}
STEPS = {"cpu": 1, "cuda": 5}  # of one timing
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}  # relative difference of the losses
NOISE, SAME, FULL = "noise: plain bf16 against itself", "bf16 against plain bf16", "bf16 against plain fp32"


def batches(config: Config, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batch for ever, in the host's memory as the loader has it: moments with unit deviation, labels."""
    rng = torch.Generator().manual_seed(0)
    batch, channels = config.train.global_batch_size, config.latent_channels
    mean = torch.randn(batch, channels, *config.grid, generator=rng) / config.tokenizer.latent_scale
    moments = torch.cat([mean, torch.full_like(mean, -4.0)], dim=1)
    labels = torch.randint(config.data.num_classes, (batch,), generator=rng)
    if device.type == "cuda":
        moments, labels = moments.pin_memory(), labels.pin_memory()
    while True:
        yield moments, labels


class Plain:
    """The transcription and its training step.

    Args:
        config: the recipe.
        network: on the device.
        precision: of its autocast.
        device: where it trains.
    """

    def __init__(self, config: Config, network: plain.PlainXAR, precision: str, device: torch.device) -> None:
        self.config, self.network, self.precision, self.device = config, network.train(), precision, device
        train = config.train
        decayed = [p for p in network.parameters() if p.ndim >= 2]
        free = [p for p in network.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": free, "weight_decay": 0.0}]
        self.foreach = device.type == "cuda"  # as torch does if not told otherwise
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=train.betas, foreach=self.foreach, fused=False)
        self.average = [p.detach().clone() for p in network.parameters()]
        self.grouping = build_grouping(config.entity, config.grid)
        self.batches, self.step = batches(config, device), 0

    def loss(self, step: int) -> Tensor:
        """The mean loss of a step's draws."""
        config = self.config
        moments, labels = (tensor.to(self.device) for tensor in next(self.batches))
        draws = draw_step(config, self.grouping, step, self.device)
        latents = sample_latents(moments, draws.posterior_noise, config.tokenizer.latent_scale)
        labels = torch.where(draws.drop_label, torch.full_like(labels, config.null_label), labels)
        with autocast(self.precision, self.device):
            return plain.training_forward(self.network, latents, draws.t, draws.noise, labels)

    def take_step(self) -> None:
        """Forward, backward, clip, AdamW, EMA, all plain."""
        loss = self.loss(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.train.grad_clip, foreach=self.foreach)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.average, self.network.parameters(), strict=True):
                average.mul_(0.9999).add_(parameter, alpha=0.0001)
        loss.item()
        self.step += 1


class Ours:
    """The step of `xar train`.

    Args:
        config: the recipe.
        weights: to start from, under our names; None keeps those of the recipe's seed.
        device: where it trains.
    """

    def __init__(self, config: Config, weights: dict[str, Tensor] | None, device: torch.device) -> None:
        self.ranks = Ranks(0, 0, 1, device)
        self.state = TrainState.fresh(config, device, self.ranks)
        if weights is not None:
            self.state.model.load_state_dict(weights)
            self.state.averages.load(config.train.ema_decays[0], weights)
        self.plan = make_plan(config, 1, config.data.num_images)
        self.batches, self.window = batches(config, device), Window(self.ranks, self.state.model.grouping.lengths)

    def loss(self, step: int) -> Tensor:
        """The mean loss of a step's draws."""
        config, device = self.state.config, self.ranks.device
        moments, labels = (tensor.to(device, non_blocking=True) for tensor in next(self.batches))
        draws = draw_step(config, self.state.model.grouping, step, device)
        return batch_loss(self.state.wrapped, config, self.state.model.grouping, moments, labels, draws).mean()

    def take_step(self) -> None:
        """One optimizer step."""
        take_step(self.state, self.plan, self.batches, self.ranks, self.window)


def recipe(options: argparse.Namespace, batch: int, precision: str, dropout: float | None = None) -> Config:
    """The recipe at this batch and precision; `dropout` replaces its own."""
    return load_recipe(
        options.recipe,
        [
            f"train.global_batch_size={batch}", f"train.max_batch_per_rank={batch}",
            f"train.precision={precision}", "train.base_lr=1e-6", *options.overrides,
            *([] if dropout is None else [f"model.dropout={dropout}"]),
        ],
    )  # fmt: skip


def plain_network(config: Config) -> plain.PlainXAR:
    """The transcription with seeded weights, on the CPU."""
    model = config.model
    torch.manual_seed(0)
    return plain.PlainXAR(model.dim, model.depth, model.heads, dropout=model.dropout)


def check_losses(options: argparse.Namespace, batch: int, device: torch.device) -> dict[str, Any]:
    """The losses of both without dropout; without agreement no speed is measured."""
    found = {}
    for precision, tolerance in TOLERANCE.items():
        config = recipe(options, batch, precision, dropout=0.0)
        network = plain_network(config)
        weights = dict(from_published(network.state_dict(), config))
        with torch.no_grad():
            theirs = float(Plain(config, network.to(device), precision, device).loss(0))
            ours = float(Ours(config, weights, device).loss(0))
        if not abs(theirs - ours) <= tolerance * theirs:
            raise SystemExit(f"{precision}: the losses differ, {theirs} plain and {ours} ours: no speed is measured.")
        say(f"{precision}: losses agree, {theirs:.6f} plain and {ours:.6f} ours")
        found[precision] = {"plain": theirs, "ours": ours}
    timing.forget_peak(device)
    return found


def time_ours(
    ours: Ours, repeated: Callable[[Callable[[], None]], Timed], repeats: int
) -> tuple[Timed, float, int, dict[str, float]]:
    """Ours alone: its times, seconds of the first step with its compilation, bytes at the peak of a step, reserved."""
    timing.forget_peak(ours.ranks.device)
    first = seconds(ours.take_step)
    say(f"compile and first step of ours: {first:.1f} s")
    ours.take_step()
    timing.forget_peak(ours.ranks.device)
    ours.take_step()
    peak, reserved = timing.peak_memory(ours.ranks.device), timing.reserved_memory(ours.ranks.device)
    timed = repeated(ours.take_step)
    for _ in range(repeats):
        timed()
    return timed, first, peak, reserved


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="base")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, help="default: 8 on a CPU, 64 on a GPU")
    parser.add_argument("--steps", type=int, help="of one timing; default: 1 on a CPU, 5 on a GPU")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--no-plain", action="store_true", help="ours alone, as many timings as --pairs says")
    timing.add_clock_options(parser)
    return parser


def main() -> None:
    options = parser().parse_args()
    device = timing.use_clock(options)
    batch, steps = options.batch or BATCH[device.type], options.steps or STEPS[device.type]
    config = recipe(options, batch, "bf16")
    speeds: dict[str, float] = {}
    result: dict[str, Any] = {
        **timing.machine(options, device), "recipe": options.recipe, "batch": batch, "steps_per_timing": steps,
        "dropout": config.model.dropout,
    }  # fmt: skip

    def repeated(take: Callable[[], None]) -> Timed:
        def run() -> None:
            for _ in range(steps):
                take()

        return Timed(run)

    if options.no_plain:
        ours = Ours(config, None, device)
        timed, first, peak_bytes, reserved = time_ours(ours, repeated, options.pairs)
        last = float(ours.loss(0).detach())
        if not math.isfinite(last):
            raise SystemExit(f"The loss is {last}: no speed is printed.")
    else:
        result["losses"] = check_losses(options, batch, device)
        network = plain_network(config)
        ours = Ours(config, dict(from_published(network.state_dict(), config)), device)
        timed, first, peak_bytes, reserved = time_ours(ours, repeated, 1)
        network = network.to(device)
        plain_bf16 = Plain(config, network, "bf16", device)
        plain_fp32 = Plain(recipe(options, batch, "fp32"), network, "fp32", device)
        in_bf16, in_fp32 = repeated(plain_bf16.take_step), repeated(plain_fp32.take_step)
        for warm in (plain_bf16, plain_fp32):
            warm.take_step()
        timed.times.clear()
        result[NOISE] = spread(pairs(in_bf16, in_bf16, options.pairs))
        say(f"{NOISE}: {spread_text(result[NOISE])}")
        result[SAME] = spread(pairs(in_bf16, timed, options.pairs))
        say(f"{SAME}: {spread_text(result[SAME])}")
        result[FULL] = spread(pairs(in_fp32, timed, options.pairs))
        say(f"{FULL}: {spread_text(result[FULL])}")
        speeds = {f"plain {name}": batch * steps / one.median for name, one in (("bf16", in_bf16), ("fp32", in_fp32))}
        del plain_bf16, plain_fp32, network, in_bf16, in_fp32
        gc.collect()
    speed, peak = batch * steps / timed.median, timing.matmul_peak("bf16", device)
    share = speed * ours.plan.flops_per_image / peak
    against = "" if options.no_plain else f", {spread_text(result[SAME])} as fast as plain bf16"
    print(json.dumps({
        **result,
        "first_step_with_compilation_seconds": first,
        "step_seconds": {name: value / steps for name, value in timed.as_dict().items()},
        "images_per_second": {**speeds, "ours": speed},
        "gigaflop_per_image": ours.plan.flops_per_image / 1e9,
        "matmul_peak_gigaflops": peak / 1e9,
        "share_of_peak": share,
        "peak_memory_mb": peak_bytes / 1024**2,
        **reserved,
        "estimated_memory_mb": ours.plan.memory_bytes / 1024**2,
        "summary": f"{options.recipe}, batch {batch}: {speed:.1f} images/s, "
                   f"{timed.median / steps:.4f} s a step{against}, "
                   f"{share:.0%} of {peak / 1e12:.1f} TFLOP/s, {peak_bytes / 1024**3:.1f} GB "
                   f"(estimate {ours.plan.memory_bytes / 1024**3:.1f})",
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
