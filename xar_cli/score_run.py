"""`xar fid --run` and `xar fid sweep`: images of a run go straight from the sampler into the feature network.

One of the two places where stages meet inside a process (the other is the quickstart): it hands the sample stage's
images to the evaluate stage, and owns no step of either.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xar_cli.config.recipes import override
from xar_cli.config.schema import Config, Section
from xar_cli.distributed import Ranks, process_group
from xar_cli.errors import UserError
from xar_cli.evaluate import Evaluator, Settings, evaluate
from xar_cli.evaluate.images import GeneratedImages
from xar_cli.evaluate.protocols import pick_protocol, pick_protocols
from xar_cli.evaluate.reference import open_reference
from xar_cli.evaluate.report import facts_of_sampling
from xar_cli.evaluate.stage import REPORT_BYTES, result_and_report
from xar_cli.evaluate.sweep import Point, Score, Steps, run_sweep
from xar_cli.run_dir import RunDir, require_writable
from xar_cli.sample.manifest import FREE_KEYS, make_manifest
from xar_cli.sample.network import SamplingNetwork
from xar_cli.sample.request import build_settings, sampling_overrides
from xar_cli.sample.settings import SampleSettings
from xar_cli.sample.stage import batches, draw_images, expect_images, load_codec, load_network
from xar_cli.stopping import stop_at_once
from xar_cli.weights import open_weights
from xar_cli.weights.ranks import open_on_all


class RunSettings(Section):
    """What `xar fid --run` was asked for.

    Attributes:
        run: the run folder.
        reference: path of real images or statistics.
        protocols: names; empty for the recipe's.
        count: images to draw; None for the recipe's.
        seed: of noise and labels.
        tokenizer_weights: file of KL-16's weights.
        measure: how to measure; its batch size is that of the draws.
        batch_size: images drawn together; None for the recipe's.
        report: folder for the report, or None.
        device: auto, cpu, cuda or cuda:N.
    """

    run: Path
    reference: Path
    protocols: tuple[str, ...] = ()
    count: int | None = None
    seed: int = 0
    tokenizer_weights: Path | None = None
    measure: Settings
    batch_size: int | None = None
    report: Path | None = None
    device: str = "auto"


class SweepSettings(RunSettings):
    """What `xar fid sweep` was asked for; empty numbers take the recipe's.

    Attributes:
        guidance_scales, step_counts: the points are all their combinations.
        out: folder for the results; None for RUN/sweep.
    """

    guidance_scales: tuple[float, ...] = ()
    step_counts: tuple[Steps, ...] = ()
    out: Path | None = None


def fid_of_run(settings: RunSettings) -> dict[str, Any]:
    """Draw images of a run, judge them, write the report where one is asked for; returns what `--json` prints."""
    reference = open_reference(settings.reference, settings.measure.image_size)
    if settings.report is not None:
        require_writable(settings.report, REPORT_BYTES, "the report")
    with process_group(settings.device) as ranks, stop_at_once(signal.SIGTERM):
        source = _Source(settings, ranks)
        images = source.images(source.sampling)
        made = facts_of_sampling(images)
        measure = settings.measure.model_copy(update={"batch_size": source.sampling.config.sample.batch_size})
        found = evaluate(images, reference, source.protocols, settings=measure, ranks=ranks)
        if not ranks.is_main:
            return {}
        return result_and_report(found, made, images, reference, measure, settings.report)


def sweep_of_run(settings: SweepSettings) -> dict[str, Any]:
    """Score every combination of guidance and steps; returns what `--json` prints."""
    reference = open_reference(settings.reference, settings.measure.image_size)
    run = RunDir(settings.run).require()
    out = settings.out or run.root / "sweep"
    require_writable(out, 1 << 20, "the sweep")
    with process_group(settings.device) as ranks, stop_at_once(signal.SIGTERM):
        source = _Source(settings, ranks)
        config = source.sampling.config
        measure = settings.measure.model_copy(update={"batch_size": config.sample.batch_size})
        protocol = pick_protocol(source.protocols).name
        judge = Evaluator(reference, protocol, settings=measure, ranks=ranks)

        def config_at(point: Point) -> Config:
            values = [f"sample.guidance_scale={point.guidance_scale}", f"sample.num_steps={point.num_steps}"]
            return override(config, values)

        scales = settings.guidance_scales or (config.sample.guidance_scale,)
        steps = settings.step_counts or (config.sample.num_steps,)
        for point in itertools.product(scales, steps):
            config_at(Point(*point))  # a wrong one is refused before the first is drawn

        def score(point: Point) -> Score | None:
            judge.prepare(source.sampling.count)
            if "network" not in vars(source):  # a first batch, so that compiling does not count in the speed
                warm_up = range(min(config.sample.batch_size, source.sampling.count))
                source.images(source.sampling).load_many(list(warm_up))
            changed = source.sampling.model_copy(update={"config": config_at(point)})
            images = source.images(changed, keep_features=False)
            found = judge.evaluate(images)
            if not ranks.is_main:
                return None
            metrics = found.first.metrics
            first = next(iter(metrics.values()))
            assert first.value is not None
            speed = ranks.world_size * source.drawn / max(source.seconds, 1e-9)
            return Score(
                point, first.name, first.value, first.error, speed, {key: one.value for key, one in metrics.items()}
            )

        identity = {
            "weights_sha256": source.weights_sha256, "tokenizer": source.codec.tokenizer.identity,
            "reference": reference.name, "protocol": protocol, "count": source.sampling.count, "seed": settings.seed,
            "solver": config.sample.solver, **judge.identity(),
        }  # fmt: skip
        return run_sweep(out, identity, scales, steps, score, ranks)


class _Source:
    """The model of a run, ready to draw.

    Attributes:
        sampling: what `xar sample` would be asked for.
        protocols: names, as asked or the recipe's.
        drawn, seconds: images drawn by this rank since `images` was last called, and the time that took.
    """

    def __init__(self, settings: RunSettings, ranks: Ranks) -> None:
        self.ranks, self.drawn, self.seconds = ranks, 0, 0.0
        run = RunDir(settings.run).require()
        nothing = build_settings(
            run.root, None, sampling_overrides(batch_size=settings.batch_size), ema=True, classes=None,
            count=settings.count or 1, seed=settings.seed, out=Path("."), tokenizer_weights=settings.tokenizer_weights,
            device=settings.device,
        )  # fmt: skip
        config = nothing.config
        self.sampling = nothing.model_copy(update={"count": settings.count or config.evaluate.count})
        self.protocols = [one.name for one in pick_protocols(settings.protocols or config.evaluate.protocol)]
        if self.sampling.count < 2:
            raise UserError("One image is no distribution.", "Give a larger --count.")
        self.codec = load_codec(self.sampling, ranks.device)
        self._weights, self.weights_sha256 = open_on_all(str(run.root), lambda file: open_weights(file, config), ranks)

    @cached_property
    def network(self) -> SamplingNetwork:
        """The network; not loaded where all features are in the cache."""
        share = -(-self.sampling.count // self.ranks.world_size)
        expect_images(self.sampling.config, self.codec, share)
        return load_network(self.sampling.config, lambda: self._weights.load(self.ranks.device), share)

    def images(self, sampling: SampleSettings, keep_features: bool = True) -> GeneratedImages:
        """The images that `xar sample` would write with these settings, drawn when they are asked for."""
        self.drawn, self.seconds = 0, 0.0
        manifest = make_manifest(sampling, self.weights_sha256, self.codec.tokenizer.identity)
        labels = manifest["labels"]

        def draw(indices: Sequence[int]) -> np.ndarray:
            began = time.monotonic()
            pieces = []
            for piece in batches(indices, sampling.config.sample.batch_size):
                drawn = draw_images(
                    sampling.config, self.network, self.codec, sampling.seed, piece, [labels[index] for index in piece],
                    self.ranks.device,
                )  # fmt: skip
                pieces.append(drawn.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy())
            self.drawn, self.seconds = self.drawn + len(indices), self.seconds + time.monotonic() - began
            return np.concatenate(pieces)

        identity = {key: value for key, value in manifest.items() if key not in FREE_KEYS}
        return GeneratedImages(
            f"{sampling.count} images drawn from '{sampling.weights}'", np.array(labels), draw, str(identity),
            sampling.class_names or None, manifest, keep_features,
        )  # fmt: skip
