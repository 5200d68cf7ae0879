"""Training-step speed against the plain transcription: ratios of pairs in one process, with their spread.

    python -m benchmarks.training                              # xAR-B, batch 8, two cores: some minutes
    python -m benchmarks.training --device cuda                # batch 64, five steps a timing
    python -m benchmarks.training --device cuda --recipe large --no-plain     # ours alone

Plain is the paper's arithmetic as eager code (benchmarks/plain.py): per-token modulation, dense mask, unfused AdamW (on
a GPU by torch's default, over all tensors at once), one EMA update per parameter and `loss.item()` every step. Ours is
the step of `xar train`, compiled. Every ratio is of two runs made one after the other (A B B A); median, minimum and
maximum are printed, the plain code against itself first: that is the noise. Losses and gradients of both, and what one
step makes of the weights and their average, are compared for the same weights and draws, without dropout, before any
speed is printed; with `--no-plain` they are not, and ours is timed alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain, timing
from benchmarks.sampling import require_plain
from benchmarks.timing import Timed, pairs, positive, require_agreement, say, seconds, spread, spread_text
from xar_cli.config import Config
from xar_cli.distributed import Ranks
from xar_cli.model import build_grouping
from xar_cli.precision import autocast
from xar_cli.tokenizer.codec import sample_latents
from xar_cli.train.draws import draw_step
from xar_cli.train.plan import make_plan
from xar_cli.train.state import TrainState
from xar_cli.train.step import backward, take_step
from xar_cli.train.window import Window
from xar_cli.weights import from_published

LR = 1e-6
COMPARED = ("model.dropout=0", "train.ema_decays=[0.9]")  # so that float32 holds what a step adds to the average,
COMPARED_LR = 1e-2  # and to the weights
BATCH = {"cpu": 8, "cuda": 64}
STEPS = {"cpu": 1, "cuda": 5}  # of one timing
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}  # relative distance of the gradients; of the losses a tenth
UPDATE_TOLERANCE = 1e-2  # of what a step in float32 adds: AdamW's first one is nearly the sign of each gradient
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


def gradients_of(network: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient on the CPU, 0 where there is none."""
    return {
        name: torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad.clone().cpu()
        for name, parameter in network.named_parameters()
    }


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
        self.foreach = device.type == "cuda"  # as torch's AdamW does if not told otherwise
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, foreach=self.foreach, fused=False)
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

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss of step 0 and its gradients, under our names."""
        loss = self.loss(0)
        loss.backward()
        found = gradients_of(self.network)
        self.optimizer.zero_grad()
        return loss.item(), dict(from_published(found, self.config))

    def take_step(self) -> None:
        """Forward, backward, clip, AdamW, EMA, all plain."""
        loss, decay = self.loss(self.step), self.config.train.ema_decays[0]
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.train.grad_clip, foreach=self.foreach)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.average, self.network.parameters(), strict=True):
                average.mul_(decay).add_(parameter, alpha=1 - decay)
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

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss of step 0 and its gradients."""
        one = torch.ones((), device=self.ranks.device)
        loss = backward(self.state, self.plan, self.batches, self.ranks, one, None)
        found = gradients_of(self.state.model)
        self.state.optimizer.zero_grad()
        return loss.item(), found

    def take_step(self) -> None:
        """One optimizer step."""
        take_step(self.state, self.plan, self.batches, self.ranks, self.window)


def recipe(
    options: argparse.Namespace, batch: int, precision: str, lr: float = LR, changes: Sequence[str] = ()
) -> Config:
    """The recipe at this batch and precision, with a learning rate that is there from the first step on."""
    own = [
        f"train.global_batch_size={batch}", f"train.max_batch_per_rank={batch}", f"train.precision={precision}",
        f"train.base_lr={lr * 256 / batch}", f"train.min_lr={lr}", "train.warmup_fraction=0", *changes,
    ]  # fmt: skip
    return timing.recipe_with(options.recipe, options.overrides, own)


def plain_network(config: Config) -> plain.PlainXAR:
    """The transcription with seeded weights, on the CPU."""
    model = config.model
    torch.manual_seed(0)
    return plain.PlainXAR(model.dim, model.depth, model.heads, dropout=model.dropout)


def compare(options: argparse.Namespace, batch: int, device: torch.device) -> dict[str, Any]:
    """How far apart both are without dropout; without agreement no speed is measured."""
    found: dict[str, Any] = {}
    for precision, tolerance in TOLERANCE.items():
        config = recipe(options, batch, precision, COMPARED_LR, COMPARED)
        network = plain_network(config)
        weights = {name: start.clone() for name, start in from_published(network.state_dict(), config).items()}
        theirs, ours = Plain(config, network.to(device), precision, device), Ours(config, weights, device)
        (their_loss, their_gradients), (our_loss, our_gradients) = theirs.gradients(), ours.gradients()
        say(f"{precision}: losses {their_loss:.6f} plain and {our_loss:.6f} ours")
        named = sorted(their_gradients)
        distances = {
            "loss": abs(their_loss - our_loss) / their_loss,
            "gradients": timing.distance(
                [our_gradients[name] for name in named], [their_gradients[name] for name in named]
            ),
        }
        require_agreement(f"{precision}: the losses", distances["loss"], tolerance / 10)
        require_agreement(f"{precision}: the gradients", distances["gradients"], tolerance)
        if precision == "fp32":
            distances |= compare_steps(theirs, ours, weights)
        found[precision] = {"loss_plain": their_loss, "loss_ours": our_loss, "relative_difference": distances}
    timing.forget_peak(device)
    return found


def compare_steps(theirs: Plain, ours: Ours, before: dict[str, Tensor]) -> dict[str, float]:
    """How far apart a step of both puts the weights, and their average, relative to how far it moves them."""
    theirs.take_step()
    ours.take_step()
    config, names = theirs.config, [name for name, _ in theirs.network.named_parameters()]
    averages = dict(zip(names, theirs.average, strict=True))
    state, decay = ours.state, config.train.ema_decays[0]
    made: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = {
        "weights": (dict(state.model.named_parameters()), dict(theirs.network.named_parameters())),
        "average": (state.averages.tensors(decay), averages),
    }
    found = {}
    for what, (mine, published) in made.items():
        their = from_published({name: tensor.detach().cpu() for name, tensor in published.items()}, config)
        moves = [
            [one[name].detach().cpu().double() - start.double() for name, start in before.items()]
            for one in (mine, their)
        ]
        found[f"step of the {what}"] = timing.distance(*moves)
        require_agreement(f"What a step adds to the {what}", found[f"step of the {what}"], UPDATE_TOLERANCE)
    return found


def time_ours(
    ours: Ours, repeated: Callable[[Callable[[], None]], Timed], repeats: int
) -> tuple[Timed, float, dict[str, float]]:
    """Ours alone: its times, seconds of the first step with its compilation, memory of a step."""
    timing.forget_peak(ours.ranks.device)
    first = seconds(ours.take_step)
    say(f"compile and first step of ours: {first:.1f} s")
    ours.take_step()
    timing.forget_peak(ours.ranks.device)
    ours.take_step()
    memory = timing.peak_memory(ours.ranks.device)
    timed = repeated(ours.take_step)
    for _ in range(repeats):
        timed()
    return timed, first, memory


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="base")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--batch", type=positive, help="default: 8 on a CPU, 64 on a GPU")
    parser.add_argument("--steps", type=positive, help="of one timing; default: 1 on a CPU, 5 on a GPU")
    parser.add_argument("--pairs", type=positive, default=5)
    parser.add_argument("--no-plain", action="store_true", help="ours alone, as many timings as --pairs says")
    timing.add_clock_options(parser)
    return parser


@timing.command
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
        timed, first, memory = time_ours(ours, repeated, options.pairs)
        last, _ = ours.gradients()
        if not math.isfinite(last):
            raise SystemExit(f"The loss is {last}: no speed is printed.")
    else:
        require_plain(config)
        result["compared"] = compare(options, batch, device)
        network = plain_network(config)
        ours = Ours(config, dict(from_published(network.state_dict(), config)), device)
        timed, first, memory = time_ours(ours, repeated, 1)
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
        **memory,
        "estimated_memory_mb": ours.plan.memory_bytes / 1024**2,
        "summary": f"{options.recipe}, batch {batch}: {speed:.1f} images/s, "
                   f"{timed.median / steps:.4f} s a step{against}, {share:.0%} of {peak / 1e12:.1f} TFLOP/s"
                   + (f", {memory['peak_memory_mb'] / 1024:.1f} GB (estimate {ours.plan.memory_bytes / 1024**3:.1f})"
                      if device.type == "cuda" else ""),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
