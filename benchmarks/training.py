"""Training-step speed against the plain transcription: ratios of pairs in one process, with their spread.

    python -m benchmarks.training                              # xAR-B, batch 8, two cores: some minutes
    python -m benchmarks.training --recipe base --pairs 5 --json

Plain is SPEC as eager code: per-token modulation, dense mask, unfused AdamW, one EMA update per parameter and
`loss.item()` every step. Ours is the step of `xar train`, compiled. Every ratio is of two runs made one after the
other (A B B A); median, minimum and maximum are printed, the plain code against itself first: that is the noise. Losses
of both are compared for the same weights and draws before any speed is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import plain
from xar_cli.config import Config, load_recipe
from xar_cli.distributed import Ranks
from xar_cli.precision import autocast
from xar_cli.tokenizer.codec import sample_latents
from xar_cli.train.draws import draw_step
from xar_cli.train.objective import batch_loss
from xar_cli.train.plan import make_plan
from xar_cli.train.state import TrainState
from xar_cli.train.step import take_step
from xar_cli.train.window import Window
from xar_cli.weights import from_published

CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1, CPU)
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}  # relative difference of the losses


def batches(config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batch for ever: moments with unit deviation, labels."""
    rng = torch.Generator().manual_seed(0)
    batch, channels = config.train.global_batch_size, config.latent_channels
    mean = torch.randn(batch, channels, *config.grid, generator=rng) / config.tokenizer.latent_scale
    moments = torch.cat([mean, torch.full_like(mean, -4.0)], dim=1)
    labels = torch.randint(config.data.num_classes, (batch,), generator=rng)
    while True:
        yield moments, labels


class Plain:
    """The transcription and its training step."""

    def __init__(self, config: Config, network: plain.PlainXAR, precision: str) -> None:
        self.config, self.network, self.precision = config, network.train(), precision
        train = config.train
        decayed = [p for p in network.parameters() if p.ndim >= 2]
        free = [p for p in network.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": free, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=train.betas, foreach=False, fused=False)
        self.average = [p.detach().clone() for p in network.parameters()]
        self.grouping = TrainState.fresh(load_recipe("base", TINY), CPU).model.grouping
        self.batches, self.step = batches(config), 0

    def loss(self, step: int) -> Tensor:
        """The mean loss of a step's draws."""
        config, (moments, labels) = self.config, next(self.batches)
        draws = draw_step(config, self.grouping, step, CPU)
        latents = sample_latents(moments, draws.posterior_noise, config.tokenizer.latent_scale)
        labels = torch.where(draws.drop_label, torch.full_like(labels, config.null_label), labels)
        with autocast(self.precision, CPU):
            return plain.training_forward(self.network, latents, draws.t, draws.noise, labels)

    def take_step(self) -> None:
        """Forward, backward, clip, AdamW, EMA, all plain."""
        loss = self.loss(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.train.grad_clip, foreach=False)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.average, self.network.parameters(), strict=True):
                average.mul_(0.9999).add_(parameter, alpha=0.0001)
        loss.item()
        self.step += 1


TINY = ("model.dim=16", "model.depth=1", "model.heads=2")  # only for its grouping


class Ours:
    """The step of `xar train`."""

    def __init__(self, config: Config, weights: dict[str, Tensor]) -> None:
        self.state = TrainState.fresh(config, CPU, ALONE)
        self.state.model.load_state_dict(weights)
        self.state.averages.load(config.train.ema_decays[0], weights)
        self.plan = make_plan(config, 1, config.data.num_images)
        self.batches, self.window = batches(config), Window(ALONE, self.state.model.grouping.lengths)

    def loss(self, step: int) -> Tensor:
        """The mean loss of a step's draws."""
        config, (moments, labels) = self.state.config, next(self.batches)
        draws = draw_step(config, self.state.model.grouping, step, CPU)
        return batch_loss(self.state.wrapped, config, self.state.model.grouping, moments, labels, draws).mean()

    def take_step(self) -> None:
        """One optimizer step."""
        take_step(self.state, self.plan, self.batches, ALONE, self.window)


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratios(slow: Callable[[], None], fast: Callable[[], None], pairs: int) -> dict[str, float]:
    """How many times longer `slow` takes: pairs in turns, A B B A."""
    found = []
    for pair in range(pairs):
        if pair % 2:
            quick, long = seconds(fast), seconds(slow)
        else:
            long, quick = seconds(slow), seconds(fast)
        found.append(long / quick)
    return {"median": statistics.median(found), "min": min(found), "max": max(found), "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def config_of(precision: str, dropout: float = 0.1) -> Config:
        return load_recipe(
            options.recipe,
            [
                f"train.global_batch_size={options.batch}", f"train.max_batch_per_rank={options.batch}",
                f"train.precision={precision}", f"model.dropout={dropout}", "train.base_lr=1e-6",
            ],
        )  # fmt: skip

    def plain_network(dropout: float) -> plain.PlainXAR:
        model = config_of("fp32").model
        torch.manual_seed(0)
        return plain.PlainXAR(model.dim, model.depth, model.heads, dropout=dropout)

    for precision, tolerance in TOLERANCE.items():  # parity first: without it no speed is printed
        config, network = config_of(precision, dropout=0.0), plain_network(0.0)
        weights = dict(from_published(network.state_dict(), config))
        with torch.no_grad():
            theirs, ours = float(Plain(config, network, precision).loss(0)), float(Ours(config, weights).loss(0))
        if abs(theirs - ours) > tolerance * theirs:
            raise SystemExit(f"{precision}: the losses differ, {theirs} plain and {ours} ours: no speed is measured.")
        print(f"{precision}: losses agree, {theirs:.6f} plain and {ours:.6f} ours", flush=True)

    network = plain_network(0.1)
    weights = dict(from_published(network.state_dict(), config_of("bf16")))
    plain_bf16, plain_fp32 = Plain(config_of("bf16"), network, "bf16"), Plain(config_of("fp32"), network, "fp32")
    ours = Ours(config_of("bf16"), weights)
    print(f"compile and first step of ours: {seconds(ours.take_step):.1f} s", flush=True)
    for warm in (ours, plain_bf16, plain_fp32):
        warm.take_step()
    result = {
        "noise: plain bf16 against itself": ratios(plain_bf16.take_step, plain_bf16.take_step, options.pairs),
        "bf16 against plain bf16": ratios(plain_bf16.take_step, ours.take_step, options.pairs),
        "bf16 against plain fp32": ratios(plain_fp32.take_step, ours.take_step, options.pairs),
    }
    if options.json:
        print(json.dumps({"machine": platform.processor(), "torch": torch.__version__, **result}))
        return
    for name, found in result.items():
        print(
            f"{name}: {found['median']:.2f}x (min {found['min']:.2f}, max {found['max']:.2f}, {found['pairs']} pairs)"
        )


if __name__ == "__main__":
    main()
