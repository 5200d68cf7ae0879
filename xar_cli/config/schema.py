"""The one schema of a recipe: what is chosen stands here as a field, what follows from it as a property.

Owns every fact about grid, entities, channels and classes, and what fits together, in a recipe and in a new run. Reads
no file (recipes.py does) and knows no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from xar_cli.errors import did_you_mean

KL16_STRIDE = 16  # of the KL-16 tokenizer: 256 pixels -> 16 latent positions
KL16_CHANNELS = 16
MAX_STEPS = 1000  # the network tells 1001 timesteps apart
SEED_LIMIT = 2**64  # torch's generators take seeds below it
LR_BATCH_UNIT = 256  # lr = base_lr * global_batch_size / 256 (paper, section 4)


class Section(BaseModel):
    """A part of the config: immutable; a key it does not know is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def square_or_pair(value: Any) -> int | tuple[int, int]:
    """The one form of the sides of a rectangle: its side where it is square, else (height, width).

    Args:
        value: a whole number, or a list or tuple of two, each above 0.

    Raises:
        ValueError: anything else.
    """
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides):
        raise ValueError(
            f"must be a whole number above 0, the side of a square, or two of them, [height, width] (got {value!r})"
        )
    return sides[0] if sides[0] == sides[1] else sides


def height_and_width(sides: int | Sequence[int]) -> tuple[int, int]:
    """(height, width), or (rows, columns), of what a recipe or a file states as one side or as a pair."""
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


def sides_text(sides: int | Sequence[int]) -> str:
    """Sides for people, rows first: '8 x 12'."""
    height, width = height_and_width(sides)
    return f"{height} x {width}"


def short_sides_text(sides: int | Sequence[int]) -> str:
    """Sides for people, one where they are equal: '8', '8 x 12'."""
    height, width = height_and_width(sides)
    return str(height) if height == width else sides_text(sides)


def pixels_text(sides: int | Sequence[int]) -> str:
    """The size of an image for people: '256 x 256 pixels', '256 x 384 pixels (height x width)'."""
    height, width = height_and_width(sides)
    return f"{sides_text(sides)} pixels" + ("" if height == width else " (height x width)")


Sides = Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], BeforeValidator(square_or_pair)]


class DataConfig(Section):
    """The images."""

    dataset: str = Field(description="Name of the data set, for people and reports.")
    image_size: Sides = Field(
        description="Side of the square image in pixels, or its [height, width], after the centre crop."
    )
    image_channels: Literal[1, 3] = Field(3, description="1 for grey images, 3 for RGB.")
    mirror: bool = Field(True, description="A mirror image is as good to train on; false for digits, letters.")
    num_classes: int = Field(ge=0, description="Number of classes; 0 trains without labels.")
    num_images: int = Field(gt=0, description="Training images, for plans made without the latent cache.")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return height_and_width(self.image_size)

    @property
    def size_text(self) -> str:
        """The size for people, as in `pixels_text`."""
        return pixels_text(self.image_size)


class KL16Config(Section):
    """The KL-16 autoencoder of MAR: 16x16 pixels become one token of 16 channels."""

    kind: Literal["kl16"]
    latent_scale: float = Field(0.2325, gt=0, description="Factor that brings latents to unit variance.")


class PixelsConfig(Section):
    """No learned tokenizer: `patch` x `patch` pixels are folded into the channels of one token, losslessly."""

    kind: Literal["pixels"]
    patch: int = Field(1, gt=0, description="Side of the square of pixels that makes one token.")
    latent_scale: float = Field(1.0, gt=0, description="Factor that brings latents to unit variance.")


TokenizerConfig = Annotated[KL16Config | PixelsConfig, Field(discriminator="kind")]


def check_order(value: Any) -> Any:
    """An order of entities as a recipe may state it; raises ValueError for anything else."""
    known = ("raster", "centre_out")
    if value in known or (isinstance(value, list | tuple) and all(type(place) is int for place in value)):
        return value
    raise ValueError(f"must be {' or '.join(known)}, or a list of whole numbers (got {value!r})")


Context = Literal["random", "increasing", "decreasing", "clean"]  # flow/context.py says what they are
Order = Annotated[Literal["raster", "centre_out"] | tuple[int, ...], BeforeValidator(check_order)]
ORDER_HELP = "raster, centre_out (nearest the middle of the grid first), or a permutation: place -> raster number."


def order_misfit(order: Order, num_entities: int) -> str | None:
    """Why an order cannot be that of so many entities, or None."""
    if isinstance(order, tuple) and sorted(order) != list(range(num_entities)):
        return f"entity.order must hold each of 0 to {num_entities - 1} once"
    return None


def order_text(order: Order) -> str:
    """An order for people, behind a comma."""
    if order == "raster":
        return ", in raster order"
    return ", from the centre outwards" if order == "centre_out" else f", in the order {' '.join(map(str, order))}"


class CellEntity(Section):
    """An entity is a rectangle of neighbouring tokens (the paper's choice: squares in raster order)."""

    kind: Literal["cell"]
    size: Sides = Field(description="Side of the square cell, or its [rows, columns], in tokens.")
    order: Order = Field("raster", description=ORDER_HELP)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one cell."""
        return height_and_width(self.size)

    def text(self, grid: tuple[int, int]) -> str:
        """What the entities of a grid are, for people."""
        (height, width), (rows, columns) = grid, self.shape
        return f"{height // rows * (width // columns)} cells of {sides_text(self.shape)} tokens{order_text(self.order)}"

    def misfit(self, grid: tuple[int, int]) -> str | None:
        """Why this entity cannot group a grid, or None."""
        (height, width), (rows, columns) = grid, self.shape
        if height % rows or width % columns:
            return f"entity.size {short_sides_text(self.size)} does not divide the {height} x {width} grid"
        return order_misfit(self.order, (height // rows) * (width // columns))


class TokenEntity(Section):
    """An entity is one token."""

    kind: Literal["token"]
    order: Order = Field("raster", description=ORDER_HELP)

    def text(self, grid: tuple[int, int]) -> str:
        """What the entities of a grid are, for people."""
        return f"{grid[0] * grid[1]} tokens{order_text(self.order)}"

    def misfit(self, grid: tuple[int, int]) -> str | None:
        """Why this entity cannot group a grid, or None."""
        return order_misfit(self.order, grid[0] * grid[1])


class ImageEntity(Section):
    """The one entity is the whole image: plain flow matching."""

    kind: Literal["image"]

    def text(self, grid: tuple[int, int]) -> str:
        """What the entities of a grid are, for people."""
        return "the whole image"

    def misfit(self, grid: tuple[int, int]) -> str | None:
        """Why this entity cannot group a grid: it always can."""
        return None


class SubsampleEntity(Section):
    """Entity j holds the tokens with (row mod rows, column mod columns) = divmod(j, columns)."""

    kind: Literal["subsample"]
    stride: Sides = Field(description="Distance of an entity's tokens along rows and columns, or [rows, columns].")
    order: Order = Field("raster", description=ORDER_HELP)

    @property
    def strides(self) -> tuple[int, int]:
        """Distance of an entity's tokens from row to row, and from column to column."""
        return height_and_width(self.stride)

    def text(self, grid: tuple[int, int]) -> str:
        """What the entities of a grid are, for people."""
        rows, columns = self.strides
        return f"{rows * columns} subsamples at a stride of {sides_text(self.strides)} tokens{order_text(self.order)}"

    def misfit(self, grid: tuple[int, int]) -> str | None:
        """Why this entity cannot group a grid, or None."""
        (height, width), (rows, columns) = grid, self.strides
        if height % rows or width % columns:
            return f"entity.stride {short_sides_text(self.stride)} does not divide the {sides_text(grid)} grid"
        return order_misfit(self.order, rows * columns)


class ScaleEntity(Section):
    """Entity j is the whole latent, downsampled to sizes[j]; the last is the latent itself."""

    kind: Literal["scale"]
    sizes: tuple[Sides, ...] = Field(
        min_length=1, description="The scales, coarse to fine: sides of squares, or [rows, columns], in tokens."
    )
    resize: Literal["area", "bilinear"] = Field("area", description="How the latent is downsampled.")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of every scale."""
        return tuple(height_and_width(size) for size in self.sizes)

    def text(self, grid: tuple[int, int]) -> str:
        """What the entities of a grid are, for people."""
        listed = ", ".join(map(short_sides_text, self.sizes))
        return f"{len(self.sizes)} scales of {listed} tokens a side ({self.resize})"

    def misfit(self, grid: tuple[int, int]) -> str | None:
        """Why this entity cannot group a grid, or None."""
        shapes = self.shapes
        if shapes[-1] != grid:
            return f"the last of entity.sizes, {sides_text(shapes[-1])}, is not the {sides_text(grid)} grid"
        rising = all(
            coarse != fine and coarse[0] <= fine[0] and coarse[1] <= fine[1] for coarse, fine in pairwise(shapes)
        )
        if not rising or any(grid[0] % rows or grid[1] % columns for rows, columns in shapes):
            listed = ", ".join(map(sides_text, shapes))
            return f"entity.sizes ({listed}) must rise, and each must divide the last, rows and columns alike"
        return None


EntityConfig = Annotated[
    CellEntity | TokenEntity | ImageEntity | SubsampleEntity | ScaleEntity, Field(discriminator="kind")
]


class ModelConfig(Section):
    """The network (paper, Table 6)."""

    dim: int = Field(gt=0, description="Width D of the hidden states.")
    depth: int = Field(gt=0, description="Blocks in the encoder stack, and as many again in the decoder stack.")
    heads: int = Field(gt=0, description="Attention heads; dim / heads must be a multiple of 4 for 2-D RoPE.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout on attention and MLP while training.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the gated MLP: 4 D, times 2/3 because the gate is a third matrix."""
        return int(self.dim * 4 * 2 / 3)

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.dim % self.heads or self.head_dim % 4:
            raise ValueError(f"dim {self.dim} / heads {self.heads} must be a whole multiple of 4 (2-D RoPE)")
        return self


def check_batch_limit(value: Any) -> Any:
    """A limit of images per pass as a recipe may state it; raises ValueError for anything else."""
    if value == "auto" or (isinstance(value, int | str) and str(value).isdecimal() and int(value) > 0):
        return value
    raise ValueError(f"must be a whole number above 0, or auto (got {value!r})")


BatchLimit = Annotated[PositiveInt | Literal["auto"], BeforeValidator(check_batch_limit)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    """The optimisation (paper, section 4 and appendix)."""

    seed: int = Field(0, ge=0, lt=SEED_LIMIT, description="Seed of everything that training draws.")
    epochs: float = Field(gt=0, description="Length of the run in passes over the data.")
    global_batch_size: int = Field(gt=0, description="Images per optimizer step, over all ranks.")
    max_batch_per_rank: BatchLimit = Field(
        description="Images per forward pass on one rank, at most; auto takes what the device's memory holds."
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="Every rank holds the whole state (ddp), or a shard of it (fsdp)."
    )
    activation_checkpointing: bool = Field(
        False, description="Compute each block again in the backward pass: less memory, a third more work."
    )
    base_lr: float = Field(gt=0, description="Peak learning rate per 256 images of global batch.")
    min_lr: float = Field(ge=0, description="Learning rate at the end of the run.")
    warmup_fraction: float = Field(ge=0, le=1, description="Part of the run with linear warm-up from 0.")
    decay_start_fraction: float = Field(
        ge=0, le=1, description="Part of the run after which lr decays by half a cosine."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.96), description="AdamW betas.")
    weight_decay: float = Field(0.02, ge=0, description="AdamW weight decay, on matrices only.")
    grad_clip: float = Field(1.0, gt=0, description="Largest global norm of the gradient.")
    ema_decays: tuple[float, ...] = Field(
        (0.9999,),
        min_length=1,
        description="Decays of the weight averages; the first one is sampled by default.",
    )
    context: Context = Field("random", description="Noise of the earlier entities while training (paper, Table 5).")
    label_dropout: float = Field(0.1, ge=0, le=1, description="Probability that a label becomes the null class.")
    precision: Literal["bf16", "fp16", "tf32", "fp32"] = Field(
        "bf16", description="Arithmetic of the forward and backward pass."
    )
    compile: bool = Field(True, description="Compile the blocks with torch.compile.")
    log_every: int = Field(50, gt=0, description="Steps between records in metrics.jsonl.")
    checkpoint_every: int = Field(gt=0, description="Steps between checkpoints.")
    keep_last: int = Field(2, gt=0, description="How many of the newest checkpoints to keep.")
    keep_every: int = Field(0, ge=0, description="Also keep checkpoints at multiples of this step; 0 for none.")
    max_bad_steps: int = Field(20, gt=0, description="This many non-finite steps in a row end the run.")
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="Where metrics go besides metrics.jsonl."
    )
    preview_every: int = Field(0, ge=0, description="Steps between preview grids of fixed seeds; 0 for none.")
    preview_count: int = Field(16, gt=0, description="Images in a preview grid.")
    eval_every: float = Field(0, ge=0, description="Epochs between evaluations while training; 0 for none.")
    eval_count: int = Field(10_000, gt=1, description="Images drawn for an evaluation while training.")

    @property
    def lr(self) -> float:
        """Peak learning rate: base_lr * global_batch_size / 256."""
        return self.base_lr * self.global_batch_size / LR_BATCH_UNIT

    def faults_of_a_new_run(self) -> list[str]:
        """As of the whole recipe, `Config.faults_of_a_new_run`."""
        if self.min_lr <= self.lr:
            return []
        peak = f"{self.lr:g} (base_lr {self.base_lr:g} * {self.global_batch_size} / {LR_BATCH_UNIT})"
        return [f"train.min_lr: {self.min_lr:g} is above the peak learning rate, {peak}: it would rise at the end"]

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.decay_start_fraction < self.warmup_fraction:
            raise ValueError("decay_start_fraction must not lie before warmup_fraction")
        if any(not 0 <= decay < 1 for decay in self.ema_decays):
            raise ValueError("every ema_decays value must lie in [0, 1)")
        return self


def _check_num_steps(value: Any) -> Any:
    parts = str(value).split(":")
    if isinstance(value, int | str) and len(parts) <= 2 and all(part.isdecimal() for part in parts):
        steps = [int(part) for part in parts]
        if all(0 < count <= MAX_STEPS for count in steps):
            return steps[0] if len(set(steps)) == 1 else ":".join(map(str, steps))  # one text for one schedule
    raise ValueError(
        f"must be a whole number from 1 to {MAX_STEPS}, or first and last of a schedule, 40:15 (got {value!r})"
    )


NumSteps = Annotated[int | str, BeforeValidator(_check_num_steps)]


class SampleConfig(Section):
    """How images are drawn; the published settings are the defaults of the published recipes."""

    solver: Literal["euler_maruyama", "euler", "heun", "multistep"] = Field(
        "euler_maruyama", description="Integrator inside one entity."
    )
    num_steps: NumSteps = Field(
        description="Network evaluations per entity: one number, or first and last, '40:15', with linear steps between."
    )
    guidance_scale: float = Field(ge=0, description="Classifier-free guidance of the last entity; 1 is no guidance.")
    guidance_schedule: Literal["linear", "constant", "cosine"] = Field(
        "linear",
        description="How guidance grows from entity to entity: from none to guidance_scale, or the same for all.",
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="Timesteps t, lowest and highest, between which guidance is applied."
    )
    batch_size: int = Field(64, gt=0, description="Images drawn together on one rank.")
    compile: bool = Field(
        True,
        description="Compile the network with torch.compile where the job is long enough to pay; on a GPU, record its "
        "passes as CUDA graphs.",
    )
    decoder_precision: Literal["bf16", "fp16", "tf32", "fp32"] = Field(
        "fp32", description="Arithmetic of the KL-16 decoder (fp16 and tf32 on a GPU); the pixels tokenizer has none."
    )

    def entity_steps(self, num_entities: int) -> tuple[int, ...]:
        """Network evaluations of each entity."""
        first, _, last = str(self.num_steps).partition(":")
        if not last or num_entities == 1:
            return (int(first),) * num_entities
        slope = (int(last) - int(first)) / (num_entities - 1)
        return tuple(round(int(first) + slope * j) for j in range(num_entities))

    @model_validator(mode="after")
    def _check(self) -> SampleConfig:
        fewest = min(int(part) for part in str(self.num_steps).split(":"))
        if self.solver == "euler_maruyama" and fewest < 2:
            raise ValueError("euler_maruyama needs num_steps of 2 or more: its last step is a plain denoise")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError("guidance_interval must be two rising numbers in [0, 1]")
        return self


ProtocolName = Literal["adm", "torch-fidelity", "clean-fid", "digits"]  # evaluate/protocols.py says what they are


class EvaluateConfig(Section):
    """How results are judged."""

    protocol: str = Field(
        description=f"Evaluation protocol: {', '.join(get_args(ProtocolName))}; several with commas. It says which "
        "network, resize rule and library."
    )
    count: int = Field(gt=0, description="Generated images that the metric is computed on, 2 or more.")

    def faults_of_a_new_run(self) -> list[str]:
        """As of the whole recipe, `Config.faults_of_a_new_run`."""
        known = get_args(ProtocolName)
        unknown = [name for name in map(str.strip, self.protocol.split(",")) if name not in known]
        faults = [f"evaluate.protocol: there is no protocol '{name}'. {did_you_mean(name, known)}" for name in unknown]
        if self.count == 1:
            faults.append("evaluate.count: one image is no distribution (got 1)")
        return faults


class Published(Section):
    """What the paper reports for this recipe."""

    source: str = Field(description="Where the figures stand.")
    fid: float | None = Field(None, description="FID on 50,000 samples with guidance.")
    inception_score: float | None = Field(None, description="Inception Score of the same samples.")
    precision: float | None = Field(None, description="Precision of the same samples.")
    recall: float | None = Field(None, description="Recall of the same samples.")
    parameters: float | None = Field(None, description="Parameters in millions.")
    images_per_second: float | None = Field(None, description="Sampling speed on one A100, batch 128, 50 steps.")


class Config(Section):
    """A recipe, resolved: everything a run needs to be made again."""

    name: str = Field(description="Name of the recipe.")
    description: str = Field("", description="One line for `xar recipes list`.")
    published: Published | None = Field(None, description="The paper's results, to report beside ours.")
    data: DataConfig
    tokenizer: TokenizerConfig
    entity: EntityConfig
    model: ModelConfig
    train: TrainConfig
    sample: SampleConfig
    evaluate: EvaluateConfig

    @property
    def stride(self) -> int:
        """Pixels per token along one side."""
        return KL16_STRIDE if self.tokenizer.kind == "kl16" else self.tokenizer.patch

    @property
    def latent_channels(self) -> int:
        """Values C per token."""
        if self.tokenizer.kind == "kl16":
            return KL16_CHANNELS
        return self.data.image_channels * self.tokenizer.patch**2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns (H, W) of the latent grid."""
        height, width = self.data.image_shape
        return height // self.stride, width // self.stride

    @property
    def entity_text(self) -> str:
        """What X is, for people: '4 cells of 8 x 8 tokens, in raster order, on a grid of 16 x 16'."""
        return f"{self.entity.text(self.grid)}, on a grid of {sides_text(self.grid)}"

    @property
    def null_label(self) -> int:
        """The label that stands for 'no class': one past the last."""
        return self.data.num_classes

    def faults_of_a_new_run(self) -> list[str]:
        """What no run should begin with, a line each; runs and weights that have it already load all the same."""
        return [*self.train.faults_of_a_new_run(), *self.evaluate.faults_of_a_new_run()]

    @model_validator(mode="after")
    def _check(self) -> Config:
        for side in self.data.image_shape:
            if side % self.stride:
                stated = f"data.image_size {short_sides_text(self.data.image_size)}"
                raise ValueError(f"{stated}: {side} is not a multiple of the tokenizer's {self.stride} pixels")
        if self.tokenizer.kind == "kl16" and self.data.image_channels != 3:
            raise ValueError("tokenizer kl16 needs data.image_channels: 3")
        misfit = self.entity.misfit(self.grid)
        if misfit:
            raise ValueError(misfit)
        return self
