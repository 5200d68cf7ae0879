"""What the network can do by now: grids of fixed seeds, and a Frechet distance, while training goes on.

The one place where training calls the sample and evaluate stages. All ranks draw; rank 0 writes. The same seeds and
labels every time, from the first average of the weights. Nothing that goes wrong here ends a run, but a stop signal.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xar_cli.config.schema import Config
from xar_cli.device_memory import memory_for
from xar_cli.distributed import Ranks, whole_tensor
from xar_cli.errors import UserError
from xar_cli.evaluate import Settings as Measure
from xar_cli.evaluate import check_inputs, evaluate
from xar_cli.evaluate.images import GeneratedImages
from xar_cli.hub import parse_hub_name
from xar_cli.logs import log, read_metrics
from xar_cli.model import XAR
from xar_cli.run_dir import RunDir
from xar_cli.sample.images import grid_image, to_pil
from xar_cli.sample.network import SamplingNetwork
from xar_cli.sample.noise import balanced_label
from xar_cli.sample.stage import batches, draw_images, ready_network
from xar_cli.tokenizer import Codec, load_tokenizer
from xar_cli.train.plan import TrainPlan
from xar_cli.train.records import Records
from xar_cli.train.signals import StopError
from xar_cli.train.state import TrainState


class Preview:
    """Draws from a run while it trains.

    Args:
        config: the recipe; its sampling settings are used.
        plan: of the run, for the steps of an epoch.
        class_names: name of each label, for accuracies.
        run: the run folder.
        ranks: who draws.
        tokenizer_weights: file of KL-16's weights.
        reference: real images or their statistics, for `evaluate`.
        measure: how to measure; the recipe's protocol is used.

    Raises:
        UserError: the tokenizer's weights are missing, or what `check_evaluation` looks for.
    """

    def __init__(
        self,
        config: Config,
        plan: TrainPlan,
        class_names: Sequence[str],
        run: RunDir,
        ranks: Ranks,
        tokenizer_weights: Path | None,
        reference: Path | None,
        measure: Measure,
    ) -> None:
        self._config, self._plan, self._run, self._ranks = config, plan, run, ranks
        self._class_names = class_names
        check_evaluation(config, reference, measure)
        self._reference = reference
        self._measure = measure.model_copy(
            update={"batch_size": config.sample.batch_size, "feature_cache": measure.feature_cache or run.features}
        )
        steps = config.train.eval_every * plan.num_images / plan.global_batch_size
        self._steps_per_evaluation = max(1, round(steps)) if steps else 0
        tokenizer = load_tokenizer(config, tokenizer_weights, ranks.device)
        self._codec = Codec(tokenizer, config.tokenizer.latent_scale)
        self._classes = range(config.data.num_classes or 1)

    def look(self, state: TrainState, records: Records, interrupt: Callable[[], None], missing: bool = False) -> None:
        """Draw the grid and evaluate, where this step is one for it; every rank calls this.

        Args:
            state: of the run.
            records: where the results go.
            interrupt: called between two batches; what it raises ends the look, on all ranks.
            missing: leave out what is in the run folder already, after a run was stopped at this step.

        Raises:
            StopError: by `interrupt` of any rank.
        """
        try:
            self._look(state, records, interrupt, *self._due(state.step, missing))
        finally:
            gc.collect()  # a compiled network is a cycle of references, and shall not stay beside the training's

    def _look(
        self, state: TrainState, records: Records, interrupt: Callable[[], None], grid: bool, evaluation: bool
    ) -> None:
        if grid:
            with _run_goes_on(f"The preview of step {state.step}"):
                records.image(state.step, self.save_grid(state, interrupt))
        if evaluation:
            with _run_goes_on(f"The evaluation of step {state.step}"):
                found = self.evaluate(state, interrupt)
                records.write({"step": state.step, "evaluation": found, "measured_with": self._measured_with})

    @property
    def _measured_with(self) -> str:
        """What the numbers of an evaluation compare with: settings that a run may change on its way."""
        sample, protocol = self._config.sample, self._config.evaluate.protocol
        return f"{protocol}; {sample.solver}, {sample.num_steps} steps, guidance {sample.guidance_scale:g}"

    def is_due(self, step: int) -> bool:
        """Whether `look` has something to do at this step."""
        return any(self._due(step))

    def evaluates(self, step: int) -> bool:
        """Whether `look` makes an evaluation at this step, which may take long and is not always interrupted."""
        return self._due(step)[1]

    def _due(self, step: int, missing: bool = False) -> tuple[bool, bool]:
        """Whether this step is one for the grid, and for an evaluation."""

        def due(every: int) -> bool:
            return bool(every) and (step == self._plan.total_steps or step % every == 0)

        grid, evaluation = due(self._config.train.preview_every), due(self._steps_per_evaluation)
        if missing:
            there = self._ranks.on_main(lambda: (self._picture(step).exists(), self._evaluated(step)))
            grid, evaluation = grid and not there[0], evaluation and not there[1]
        return grid, evaluation

    def _picture(self, step: int) -> Path:
        return self._run.previews / f"step-{step:08d}.png"

    def _evaluated(self, step: int) -> bool:
        return any(record["step"] == step and "evaluation" in record for record in read_metrics(self._run.metrics))

    def save_grid(self, state: TrainState, interrupt: Callable[[], None]) -> Path:
        """Draw the preview images and write them as one picture; every rank calls this."""
        count, step = self._config.train.preview_count, state.step
        network = self._averaged(state, count)
        mine = list(range(self._ranks.rank, count, self._ranks.world_size))
        drawn = self._ranks.on_all(lambda: self._draw(network, mine, interrupt) if mine else None)
        everyones: list[Any] = self._ranks.gather(dict(zip(mine, drawn, strict=True)) if drawn is not None else {})
        path = self._picture(step)
        if self._ranks.is_main:
            images = {index: image for part in everyones for index, image in part.items()}
            columns = round(count**0.5) or 1
            picture = grid_image([to_pil(images[index]) for index in range(count)], columns)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
            except OSError as error:
                path.unlink(missing_ok=True)
                log.error("The preview of step %d could not be written (%s): the run goes on.", step, error)
        return path

    def evaluate(self, state: TrainState, interrupt: Callable[[], None]) -> dict[str, float]:
        """The numbers of the recipe's protocol, by name with their count; every rank calls this, rank 0 gets them."""
        assert self._reference is not None
        count = self._config.train.eval_count
        network = self._averaged(state, count)
        labels = np.array([self._label(index) for index in range(count)])

        def draw(indices: Sequence[int]) -> np.ndarray:
            pixels = self._draw(network, list(indices), interrupt).transpose(0, 2, 3, 1)
            return np.broadcast_to(pixels, (*pixels.shape[:3], 3))

        identity = f"step {state.step} {self._config.sample}"  # features are not kept
        manifest = {"image_size": self._config.data.image_size, "config": self._config.model_dump(mode="json")}
        images = GeneratedImages(
            f"{count} images of step {state.step}", labels, draw, identity, self._class_names, manifest,
            keep_features=False,
        )  # fmt: skip
        reference, protocol = self._reference, self._config.evaluate.protocol
        found = self._ranks.on_all(
            lambda: evaluate(images, reference, protocol, settings=self._measure, ranks=self._ranks)
        )
        if not self._ranks.is_main:
            return {}
        return {metric.name: metric.value for metric in found.first.metrics.values() if metric.value is not None}

    def _draw(self, network: SamplingNetwork, indices: list[int], interrupt: Callable[[], None]) -> np.ndarray:
        """Images of some indices: uint8 (B, channels, height, width)."""
        config, parts = self._config, []
        for chosen in batches(indices, config.sample.batch_size):
            interrupt()
            labels = [self._label(index) for index in chosen]
            drawn = draw_images(  # training shall not end at a preview
                config, network, self._codec, config.train.seed, chosen, labels, self._ranks.device,
                must_be_finite=False,
            )  # fmt: skip
            parts.append(drawn.cpu().numpy())
        return np.concatenate(parts)

    def _label(self, index: int) -> int:
        return balanced_label(self._config.train.seed, index, self._classes)

    def _averaged(self, state: TrainState, images: int) -> SamplingNetwork:
        """The network with the first average of the weights, whole, ready for so many images; every rank calls this."""
        tensors = state.averages.tensors(self._config.train.ema_decays[0])
        with torch.device("meta"):
            model = XAR(self._config)
        whole = {name: whole_tensor(tensor) for name, tensor in tensors.items()}
        model.load_state_dict(whole, strict=True, assign=True)

        def prepared() -> SamplingNetwork:
            mine = -(-images // self._ranks.world_size)
            with memory_for("A copy of the network to draw with", "Lower train.max_batch_per_rank."):
                return ready_network(self._config, model.to(self._ranks.device).eval(), mine)

        return self._ranks.on_all(prepared)


@contextmanager
def _run_goes_on(what: str) -> Iterator[None]:
    """Whatever a person can mend is told and does not end the run; a stop signal does."""
    try:
        yield
    except StopError:
        raise
    except UserError as error:
        log.error("%s failed, and the run goes on: %s", what, error)


def require_reference(config: Config, reference: Path | None, measure: Measure) -> None:
    """Raise a UserError where `train.eval_every` asks for evaluations and there is nothing to compare with, or where it
    asks for none and there is something for them alone.
    """
    if config.train.eval_every and reference is None:
        raise UserError(
            "train.eval_every asks for evaluations, and there is nothing to compare with.",
            "Give real images or their statistics: --reference PATH; or --set train.eval_every=0.",
        )
    if not config.train.eval_every and (reference is not None or measure.inception_weights):
        given = "--inception-weights" if reference is None else "--reference"
        raise UserError(
            f"{given} is given, and train.eval_every is 0: no evaluation would be made.",
            f"Add --set train.eval_every=EPOCHS, or leave {given} away.",
        )


def warn_of_unused_weights(config: Config, tokenizer_weights: Path | None) -> None:
    """Say so where the tokenizer's weights are given and nothing is ever drawn."""
    if tokenizer_weights is not None and not (config.train.preview_every or config.train.eval_every):
        log.warning("--tokenizer-weights has no effect: train.preview_every and train.eval_every are 0.")


def check_evaluation(config: Config, reference: Path | None, measure: Measure) -> None:
    """Raise a UserError where `train.eval_every` asks for evaluations that could not be made."""
    require_reference(config, reference, measure)
    if config.train.eval_every and reference is not None:
        check_inputs(reference, config.evaluate.protocol, measure, config.data.image_size)


def check_looks(config: Config, tokenizer_weights: Path | None, reference: Path | None, measure: Measure) -> None:
    """Raise a UserError where previews or evaluations are asked for and could not be made; `Preview` says the same."""
    check_evaluation(config, reference, measure)
    on_hub = tokenizer_weights is not None and parse_hub_name(tokenizer_weights) is not None  # not fetched for a look
    if (config.train.preview_every or config.train.eval_every) and not on_hub:
        load_tokenizer(config, tokenizer_weights, torch.device("cpu"))
