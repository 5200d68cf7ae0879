"""Sampling speed against the plain transcription: ratios of pairs in one process, with their spread.

    python -m benchmarks.sampling                     # xAR-B, batch 4, 4 of the 40 steps, two cores: some minutes
    python -m benchmarks.sampling --precision fp32 --pairs 3
    python -m benchmarks.sampling --device cuda --decoder --steps 8                # batch 128, decoded
    python -m benchmarks.sampling --device cuda --no-plain --batch 1 --steps 40    # ours alone: latency

Every figure is a ratio of two runs made one after the other (A B B A); median, minimum and maximum are printed, and the
plain code against itself first: that is the noise, and no ratio means more than it allows. Results of both are compared
for the same noise before any speed is printed. On a machine that others use, `--clock cpu --threads 1` counts the
processor seconds of one thread, which other people's work does not lengthen.

`--steps` is the number of evaluations per entity: the published 40 take ten times as long as the default, at nearly the
same ratio. (The plain code carries the finished entity along with each entity's first evaluation, ours keeps it in a
pass of its own; and the table of modulation is filled once. Both weigh less in 40 steps.)

With `--decoder` both programs also decode their latents by KL-16 (seeded weights) to uint8 images that stay on the
device: ours channels-last in the half precision of the device (bf16, on a GPU fp16, and there compiled, as in a long
job), or in float32 with `--precision fp32`; the plain code in float32 as written, whose convolutions a GPU computes in
TF32, torch's default. Images of the same latents are compared too. `--no-plain` times ours alone, with weights drawn on
the device and compared with nothing: for networks whose arithmetic another run has compared. The plain code knows
the published cells, classes and solver alone.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain, timing
from benchmarks.decoder import build, require_quality
from benchmarks.timing import CPU, Timed, pairs, positive, require_agreement, say, seconds, spread
from xar_cli.config import Config
from xar_cli.errors import UserError
from xar_cli.model import XAR, build_grouping
from xar_cli.model.transformer import init_weights
from xar_cli.precision import autocast
from xar_cli.sample.network import SamplingNetwork, prepare_network
from xar_cli.sample.plan import SamplingPlan, flops_per_image
from xar_cli.sample.sampler import sample_latents
from xar_cli.tokenizer.codec import Codec, to_uint8
from xar_cli.tokenizer.kl16 import KL16, PRECISIONS, build_on_meta
from xar_cli.weights import from_published

BATCH = {"cpu": 4, "cuda": 128}
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-4}  # relative distance of the latents of both, for the same noise
DECODER_REPEATS = 3


class Noise:
    """One draw of noise for both programs, in the form that each wants; drawn on the CPU, the same for every device.

    Args:
        config: the recipe.
        batch: images.
        steps: network evaluations of each entity.
        device: where it is needed.
    """

    def __init__(self, config: Config, batch: int, steps: int, device: torch.device = CPU) -> None:
        rng = torch.Generator().manual_seed(0)
        lengths = build_grouping(config.entity, config.grid).lengths
        self._entities = [
            torch.randn(steps, batch, length, config.latent_channels, generator=rng).to(device) for length in lengths
        ]

    def draw(self, entity: int, length: int, draws: int) -> Tensor:
        """For the sampler: (draws, B, L, C)."""
        return self._entities[entity][:draws]

    def for_plain(self) -> tuple[Tensor, Tensor]:
        """Initial noise (B, K, L, C) and step noise (B, K, n - 1, L, C) of entities of one length."""
        noise = torch.stack([one.transpose(0, 1) for one in self._entities], dim=1)  # (B, K, n, L, C)
        return noise[:, :, 0], noise[:, :, 1:]


def require_plain(config: Config) -> None:
    """Raise a UserError for a recipe whose arithmetic the plain code does not have."""
    published = timing.recipe_with("base", [], [])
    same = config.entity == published.entity and config.grid == published.grid
    same = same and config.latent_channels == published.latent_channels
    if not (same and config.data.num_classes == published.data.num_classes):
        raise UserError(
            "The plain code has the published cells, latents and classes alone.",
            "Take base, large or huge, or leave the plain code out with --no-plain.",
        )


def build_pair(config: Config) -> tuple[plain.PlainXAR, dict[str, Tensor]]:
    """The plain network with seeded weights, and the same weights under our names."""
    torch.manual_seed(0)
    network = plain.PlainXAR(config.model.dim, config.model.depth, config.model.heads).eval()
    return network, dict(from_published(network.state_dict(), config))


def build_ours(
    config: Config,
    state: dict[str, Tensor],
    precision: str,
    compiled: bool,
    packed: bool = True,
    device: torch.device = CPU,
    recorded: bool = True,
) -> SamplingNetwork:
    """Our network with these weights on a device, ready for sampling."""
    model = XAR(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    return prepare_network(model.eval().to(device), precision, compiled, packed, recorded)


def build_alone(
    config: Config, precision: str, compiled: bool, device: torch.device, recorded: bool = True
) -> SamplingNetwork:
    """Our network with weights that are drawn on the device, ready for sampling."""
    with torch.device(device):
        model = XAR(config)
    model = model.eval().to(device)
    init_weights(model, torch.Generator(device).manual_seed(0))
    return prepare_network(model, precision, compiled, recorded=recorded)


class Job:
    """One batch of images, by our program and by the plain one.

    Args:
        config: the recipe, with its steps.
        options: of the command line.
        device: where all of it is computed.
    """

    def __init__(self, config: Config, options: argparse.Namespace, device: torch.device) -> None:
        self.config, self.device, self.precision = config, device, options.precision
        self.compiled, self.recorded = not options.no_compile, not options.no_record
        self.batch = options.batch or BATCH[device.type]
        self.plain_precision = options.plain_precision or options.precision
        self.plan, self.steps = SamplingPlan.of(config), options.steps
        self.noise = Noise(config, self.batch, self.steps, device)
        self.labels = (torch.arange(self.batch) * 37 % config.data.num_classes).to(device)
        self.model: SamplingNetwork | None = None
        self.network: plain.PlainXAR | None = None
        self.codec: Codec | None = None
        self.plain_decoder: Any = None
        self.drawn = torch.empty(0)  # our latents, once they have been looked at
        self.decoder_precision: str | None = None
        if options.decoder:  # ours as a long job has it
            on_gpu = device.type == "cuda"
            self.decoder_precision = "fp32" if options.precision == "fp32" else "fp16" if on_gpu else "bf16"
            network = build(PRECISIONS[self.decoder_precision], channels_last=True, device=device)
            tokenizer = KL16(network, "kl16:seeded", self.decoder_precision)
            if on_gpu and self.compiled:
                tokenizer.compile("decode")
            self.codec = Codec(tokenizer, config.tokenizer.latent_scale)
            if not options.no_plain:
                self.plain_decoder = build(torch.float32, channels_last=False, device=device)

    def latents(self) -> Tensor:
        """Our latents."""
        assert self.model is not None
        with autocast(self.precision, self.device):
            return sample_latents(self.model, self.labels, self.noise, self.plan)

    def ours(self) -> Tensor:
        """Our images, or latents where there is no decoder."""
        return self.latents() if self.codec is None else self.decode(self.latents())

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Our images of these latents."""
        assert self.codec is not None
        return self.codec.images(latents)

    def plain_latents(self) -> Tensor:
        """Those of the plain code."""
        assert self.network is not None
        guidance = self.config.sample.guidance_scale
        with autocast(self.plain_precision, self.device):
            return plain.sample(self.network, self.labels, *self.noise.for_plain(), self.steps, guidance)

    @torch.no_grad()
    def plain(self) -> Tensor:
        """Images of the plain code, or latents where there is no decoder."""
        latents = self.plain_latents()
        return latents if self.plain_decoder is None else to_uint8(self.plain_pixels(latents))

    @torch.no_grad()
    def plain_pixels(self, latents: Tensor) -> Tensor:
        """What the plain decoder makes of latents."""
        return self.plain_decoder.decode(latents / self.config.tokenizer.latent_scale)

    def flops(self) -> float:
        """FLOP of one image by our program, counted from shapes."""
        work = flops_per_image(self.config, self.plan)
        if self.codec is not None:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                build_on_meta().decode(torch.empty(1, self.config.latent_channels, *self.config.grid, device="meta"))
            work += counter.get_total_flops()
        return work


def time_both(job: Job, count: int) -> tuple[Timed, dict[str, Any]]:
    """Our program against the plain one, once their latents agree: our times, and what to report."""
    network, state = build_pair(job.config)
    job.network = network.to(job.device)
    timing.forget_peak(job.device)
    expected = job.plain_latents()
    plain_times, ours = Timed(job.plain), Timed(job.ours)
    job.plain()
    plain_peak = timing.peak_memory(job.device)
    job.model = build_ours(job.config, state, job.precision, job.compiled, device=job.device, recorded=job.recorded)
    warm_up = seconds(job.ours)
    say(f"compilation and first run of ours: {warm_up:.1f} s")
    for _ in range(2):  # on a GPU the second one is recorded, and compared as it is replayed
        job.drawn = job.latents()
    difference = timing.distance(job.drawn, expected)
    require_agreement("The latents", difference, max(TOLERANCE[job.precision], TOLERANCE[job.plain_precision]))
    compared: dict[str, Any] = {"relative_difference": difference}
    if job.codec is not None and job.decoder_precision is not None:
        pixels, wanted = job.codec.decode(job.drawn), job.plain_pixels(job.drawn)
        compared["decoder_psnr_db"] = require_quality(job.decoder_precision, pixels, wanted)
    job.ours()
    noise_floor = pairs(plain_times, plain_times, count)
    ratios = pairs(plain_times, ours, count)
    job.network = job.plain_decoder = None
    return ours, {
        "plain_precision": job.plain_precision,
        **compared,
        "plain_against_itself": spread(noise_floor),
        "plain_time_over_ours": spread(ratios),
        "seconds": {"plain": plain_times.as_dict()},
        "images_per_second": {"plain": job.batch / plain_times.median},
        "first_run_with_compilation_seconds": warm_up,
        "plain_memory": plain_peak,
    }


def time_alone(job: Job, repeats: int) -> tuple[Timed, dict[str, Any]]:
    """Our program some times: its times, and what to report."""
    job.model = build_alone(job.config, job.precision, job.compiled, job.device, job.recorded)
    warm_up = seconds(job.ours)
    say(f"compilation and first run of ours: {warm_up:.1f} s")
    job.drawn = job.latents()
    if not torch.isfinite(job.drawn).all():
        raise SystemExit("The latents are not finite: no speed is printed.")
    ours = Timed(job.ours)
    for _ in range(repeats):
        ours()
    return ours, {"first_run_with_compilation_seconds": warm_up}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="base")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--batch", type=positive, help="default: 4 on a CPU, 128 on a GPU")
    parser.add_argument("--steps", type=positive, default=4)
    parser.add_argument("--pairs", type=positive, default=5)
    parser.add_argument("--decoder", action="store_true", help="decode the latents too")
    parser.add_argument("--no-plain", action="store_true", help="ours alone")
    parser.add_argument("--repeats", type=positive, default=5, help="how often, with --no-plain")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="no CUDA graphs")
    parser.add_argument("--plain-precision", choices=["bf16", "fp32"], help="default: the same")
    timing.add_clock_options(parser)
    return parser


@timing.command
def main() -> None:
    options = parser().parse_args()
    device = timing.use_clock(options)
    own = [f"sample.num_steps={options.steps}"]
    if not options.no_plain:
        own.append("sample.solver=euler_maruyama")
    config = timing.recipe_with(options.recipe, options.overrides, own)
    if not options.no_plain:
        require_plain(config)
    job = Job(config, options, device)
    ours, found = time_alone(job, options.repeats) if options.no_plain else time_both(job, options.pairs)
    if job.codec is not None:
        decoding = Timed(lambda: job.decode(job.drawn))
        for _ in range(DECODER_REPEATS):
            decoding()
        found.setdefault("seconds", {})["decoder of ours"] = decoding.as_dict()
    timing.forget_peak(device)
    job.ours()
    memory = timing.peak_memory(device)
    peak = timing.matmul_peak(options.precision, device)
    speed, share = job.batch / ours.median, job.flops() * job.batch / ours.median / peak
    against = "" if options.no_plain else f", {timing.spread_text(found['plain_time_over_ours'])} as fast as plain"
    print(json.dumps({
        **timing.machine(options, device),
        "recipe": options.recipe, "batch": job.batch, "steps_per_entity": options.steps,
        "decoder": job.decoder_precision,
        "precision": options.precision, "compiled": job.compiled,
        **({"recorded": job.recorded} if device.type == "cuda" else {}),
        **found,
        "seconds": {**found.get("seconds", {}), "ours": ours.as_dict()},
        "images_per_second": {**found.get("images_per_second", {}), "ours": speed},
        "teraflop_per_image": job.flops() / 1e12,
        "matmul_peak_gigaflops": peak / 1e9,
        "share_of_peak": share,
        **memory,
        "summary": f"{options.recipe}, batch {job.batch}, {options.steps} evaluations: {speed:.2f} images/s, "
                   f"{ours.median:.3f} s a batch{against}, {share:.0%} of {peak / 1e12:.1f} TFLOP/s, "
                   f"{max(memory.values()) / 1024:.1f} GB",
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
