"""The network as sampling needs it: weights ready for the arithmetic, modulation tabulated, blocks compiled.

Changes how the velocity is computed, never what: the numbers are those of `XAR.forward` in the same precision.
Legend: B rows, K entities, N tokens of the pass, C channels, D width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_cli.model import XAR, KVCache
from xar_cli.model.transformer import Block
from xar_cli.precision import AUTOCAST_DTYPES

# Compiling takes about a minute of a CPU or a GPU that would do so much work meanwhile: FLOP, both rounded down.
COMPILE_PAYS_FROM = {"cpu": 5e13, "cuda": 1e16}
PACKED_ROWS = 512  # rows of a product that a weight is packed for; it serves any number
PRODUCTS = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
PARTS_AROUND_ATTENTION = ("before_attention", "after_attention")
PARTS_BETWEEN_PRODUCTS = ("attention_input", "attention.split_heads", "mlp_input", "mlp.product", "add_mlp")
COMPILED_SHAPES = 64  # of one part: entities of a scale differ in length, each comes with and without a null branch
TABLE_BYTES = 512 * 1024**2  # modulation beyond this is computed again instead of kept


def compile_pays(flops: float, device: torch.device) -> bool:
    """Whether a job of so many FLOP is worth the time of compiling, and there is a compiler."""
    has_compiler = device.type != "cpu" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return has_compiler and flops >= COMPILE_PAYS_FROM.get(device.type, float("inf"))


def prepare_network(model: XAR, precision: str, compiled: bool = False, packed: bool = True) -> XAR:
    """Make a loaded network ready for sampling, in place; it cannot be trained any more.

    The weights of all linear layers take the dtype that autocast would give them at every call. On a CPU those of the
    blocks are also `packed` into the order that its matrix product reads. With `compiled`, the parts of a block become
    graphs that serve all layers: what stands between two packed products; elsewhere all before attention and all after
    it. Attention, whose context grows from entity to entity, stays between them, so that few shapes are compiled.
    """
    dtype = AUTOCAST_DTYPES.get(precision)
    for module in model.modules():
        if dtype is not None and isinstance(module, nn.Linear):
            module.to(dtype)
    packed = packed and PackedLinear.possible(model.token_proj.weight)
    for block in _blocks(model):
        if packed:
            replace_parts(block, PRODUCTS, PackedLinear)
        if compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
            parts = PARTS_BETWEEN_PRODUCTS if packed else PARTS_AROUND_ATTENTION
            replace_parts(block, parts, lambda part: torch.compile(part, dynamic=False))
    return model


def replace_parts(block: Block, paths: tuple[str, ...], ready: Callable[[Any], Any]) -> None:
    """Put what `ready` makes of each layer or method of a block in its place."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        holder = block.get_submodule(owner)
        setattr(holder, name, ready(getattr(holder, name)))


class PackedLinear(nn.Module):
    """A linear layer for a CPU, with its weight in oneDNN's own order: torch's reorders it at every call.

    Takes any dtype and gives that of its weight, as autocast would.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_ROWS)

    @staticmethod
    def possible(weight: Tensor) -> bool:
        """Whether this torch on this CPU can pack a weight of that dtype."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        if weight.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return weight.dtype == torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """(..., D in) -> (..., D out)."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")


class BatchNetwork:
    """The velocity of one batch of images: their labels, their cache, both branches of guidance.

    Args:
        model: in eval mode, see `prepare_network`.
        labels: (B,) class labels.
        guided: whether there is a null branch; its rows follow the conditional ones.
    """

    def __init__(self, model: XAR, labels: Tensor, guided: bool) -> None:
        self.model, self.guided, self.batch = model, guided, labels.shape[0]
        self._rows = self.batch * (2 if guided else 1)
        self._classes = torch.cat([labels, labels.new_full((1,), model.null_label)]) if guided else labels
        self._cache = model.new_cache(self._rows, _compute_dtype(model))
        self._table: dict[float, list[Tensor]] = {}
        self._table_bytes = 0

    def velocity(self, x: Tensor, t: float, entity: int) -> Tensor:
        """Conditional velocity (B, N, C) of one entity at t, given all earlier ones."""
        return self._run(x, t, entity, self._cache.rows(self.batch))

    def both_velocities(self, x: Tensor, t: float, entity: int) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional velocity, (B, N, C) each, in float32."""
        conditional, unconditional = self._run(torch.cat([x, x]), t, entity, self._cache).float().chunk(2)
        return conditional, unconditional

    def commit(self, tokens: Tensor, entity: int) -> None:
        """Keep the keys and values of a finished entity (B, N, C): clean, at t = 0, for both branches."""
        self._run(torch.cat([tokens, tokens]) if self.guided else tokens, 0.0, entity, self._cache)
        self._cache.commit(tokens.shape[1])

    def _run(self, x: Tensor, t: float, entity: int, cache: KVCache) -> Tensor:
        """One pass over the rows of x; the network's own forward with tabulated modulation."""
        model, rows = self.model, x.shape[0]
        place, lengths = model.grouping.span(entity), (x.shape[1],)
        rope = model.rope[:, place]
        table = self.modulation(t)
        h = model.enter(x, place)
        for layer, block in enumerate(_blocks(model)):
            if layer == len(model.encoder):
                h = model.cross(h, place)
            h = block.update(h, table[layer][:rows], rope, lengths, cache.layer(layer))
        return model.leave(h)

    def modulation(self, t: float) -> list[Tensor]:
        """Modulation (rows, 1, 6 D) of every layer at t: computed once for each class and timestep."""
        if t in self._table:
            return self._table[t]
        times = torch.full((len(self._classes), 1), t, dtype=torch.float32, device=self._classes.device)
        condition = F.silu(self.model.condition(times, self._classes))  # (B + 1, 1, D)
        layers = [self._for_rows(block.modulation(condition)) for block in _blocks(self.model)]
        size = sum(layer.nbytes for layer in layers)
        if self._table_bytes + size <= TABLE_BYTES:
            self._table[t] = layers
            self._table_bytes += size
        return layers

    def _for_rows(self, modulation: Tensor) -> Tensor:
        """From one row a class, the null class last, to one row for each row of a pass."""
        if not self.guided:
            return modulation
        return torch.cat([modulation[:-1], modulation[-1:].expand(self.batch, -1, -1)])


def _blocks(model: XAR) -> list[Block]:
    return cast("list[Block]", model.blocks)


def _compute_dtype(model: XAR) -> torch.dtype:
    """The dtype that linear layers give: autocast's where it is on, else the weights'."""
    weight = model.token_proj.weight
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
