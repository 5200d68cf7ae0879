"""What the network can do by now: grids of fixed seeds, and a Frechet distance, while training goes on.

The one place where training calls the sample and evaluate stages. All ranks draw; rank 0 writes. The same seeds and
labels every time, from the first average of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xar_cli.config.schema import Config
from xar_cli.distributed import Ranks, whole_tensor
from xar_cli.errors import UserError
from xar_cli.evaluate import Settings as Measure
from xar_cli.evaluate import evaluate
from xar_cli.evaluate.images import GeneratedImages
from xar_cli.logs import log
from xar_cli.model import XAR
from xar_cli.run_dir import RunDir
from xar_cli.sample.images import grid_image, to_pil
from xar_cli.sample.noise import balanced_label
from xar_cli.sample.stage import draw_images
from xar_cli.tokenizer import Codec, load_tokenizer
from xar_cli.train.state import TrainState


class Preview:
    """Draws from a run while it trains.

    Args:
        config: the recipe; its sampling settings are used.
        run: the run folder.
        ranks: who draws.
        tokenizer_weights: file of KL-16's weights.
        reference: real images or their statistics, for `evaluate`.
        measure: how to measure; the recipe's protocol is used.

    Raises:
        UserError: the tokenizer's weights are missing, or the reference where `train.eval_every` asks for one.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        ranks: Ranks,
        tokenizer_weights: Path | None,
        reference: Path | None,
        measure: Measure,
    ) -> None:
        self._config, self._run, self._ranks = config, run, ranks
        self._reference, self._measure = reference, measure
        if config.train.eval_every and reference is None:
            raise UserError(
                "train.eval_every asks for evaluations, and there is nothing to compare with.",
                "Give real images or their statistics: --reference PATH; or --set train.eval_every=0.",
            )
        tokenizer = load_tokenizer(config, tokenizer_weights, ranks.device)
        self._codec = Codec(tokenizer, config.tokenizer.latent_scale)
        self._classes = range(config.data.num_classes or 1)

    def save_grid(self, state: TrainState) -> Path:
        """Draw the preview images and write them as one picture; every rank calls this."""
        count, step = self._config.train.preview_count, state.step
        model = self._averaged(state)
        mine = list(range(self._ranks.rank, count, self._ranks.world_size))
        drawn = self._draw(model, mine) if mine else None
        everyones: list[Any] = self._ranks.gather(dict(zip(mine, drawn, strict=True)) if drawn is not None else {})
        path = self._run.previews / f"step-{step:08d}.png"
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

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """The numbers of the recipe's protocol, by name with their count; every rank calls this, rank 0 gets them."""
        assert self._reference is not None
        model, count = self._averaged(state), self._config.train.eval_count
        labels = np.array([self._label(index) for index in range(count)])

        def draw(indices: Sequence[int]) -> np.ndarray:
            pixels = self._draw(model, list(indices)).transpose(0, 2, 3, 1)
            return np.broadcast_to(pixels, (*pixels.shape[:3], 3))

        identity = f"{self._run.root.resolve()} step {state.step} {self._config.sample}"
        images = GeneratedImages(f"{count} images of step {state.step}", labels, draw, identity)
        measure = self._measure.model_copy(update={"batch_size": self._config.sample.batch_size})
        found = evaluate(images, self._reference, self._config.evaluate.protocol, settings=measure, ranks=self._ranks)
        if not self._ranks.is_main:
            return {}
        return {metric.name: metric.value for metric in found.first.metrics.values() if metric.value is not None}

    def _draw(self, model: XAR, indices: list[int]) -> np.ndarray:
        """Images of some indices: uint8 (B, channels, height, width)."""
        config, parts = self._config, []
        for start in range(0, len(indices), config.sample.batch_size):
            chosen = indices[start : start + config.sample.batch_size]
            labels = [self._label(index) for index in chosen]
            drawn = draw_images(  # training shall not end at a preview
                config, model, self._codec, config.train.seed, chosen, labels, self._ranks.device, must_be_finite=False
            )
            parts.append(drawn.cpu().numpy())
        return np.concatenate(parts)

    def _label(self, index: int) -> int:
        return balanced_label(self._config.train.seed, index, self._classes)

    def _averaged(self, state: TrainState) -> XAR:
        """The network with the first average of the weights, whole, in eval mode; every rank calls this."""
        tensors = state.averages.tensors(self._config.train.ema_decays[0])
        with torch.device("meta"):
            model = XAR(self._config)
        whole = {name: whole_tensor(tensor) for name, tensor in tensors.items()}
        model.load_state_dict(whole, strict=True, assign=True)
        return model.to(self._ranks.device).eval()
