"""The network as sampling needs it: weights ready for the arithmetic, modulation tabulated, blocks compiled.

Changes how the velocity is computed, never what: the numbers are those of `XAR.forward` in the same precision.
Legend: B rows, K entities, N tokens of the pass, C channels, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_cli.model import XAR, KVCache
from xar_cli.model.transformer import Block
from xar_cli.precision import AUTOCAST_DTYPES

PACKED_ROWS = 512  # rows of a product that a weight is packed for; it serves any number
PRODUCTS = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
PARTS_AROUND_ATTENTION = ("before_attention", "after_attention")
PARTS_BETWEEN_PRODUCTS = ("attention_input", "attention.split_heads", "mlp_input", "mlp.product", "add_mlp")
COMPILED_SHAPES = 64  # of one part: entities of a scale differ in length, each comes with and without a null branch
TABLE_BYTES = 512 * 1024**2  # modulation beyond this is computed again instead of kept,
TABLE_SHARE = 1 / 32  # or beyond this share of a GPU's memory
MOST_RECORDED = 1024  # passes; each takes some memory of its own

Run = Callable[..., Tensor]  # tensors in, one tensor out; whatever else it reads or writes stays where it is
Replay = Callable[[], Any]
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]  # what does a call again, and where its result will be


def prepare_network(
    model: XAR, precision: str, compiled: bool = False, packed: bool = True, recorded: bool = True
) -> SamplingNetwork:
    """Make a loaded network ready for sampling, in place; it cannot be trained any more.

    The weights of all linear layers take the dtype that autocast would give them at every call. On a CPU those of the
    blocks are also `packed` into the order that its matrix product reads. With `compiled`, the parts of a block become
    graphs that serve all layers: what stands between two packed products; elsewhere all before attention and all after
    it. Attention, whose context grows from entity to entity, stays between them, so that few shapes are compiled. On a
    GPU whole passes are also `recorded` as CUDA graphs.
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
            limits = torch._dynamo.config  # of recompilations; the name that torch 2.6 has too
            limits.cache_size_limit = max(limits.cache_size_limit, COMPILED_SHAPES)
            parts = PARTS_BETWEEN_PRODUCTS if packed else PARTS_AROUND_ATTENTION
            replace_parts(block, parts, lambda part: torch.compile(part, dynamic=False))
    return SamplingNetwork(model, CudaGraphs if recorded and model.rope.is_cuda else None)


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


class SamplingNetwork:
    """A network prepared for sampling, with what it keeps from batch to batch.

    Args:
        model: in eval mode, see `prepare_network`.
        recorder: makes what records passes (`CudaGraphs`); None runs every pass kernel by kernel.
    """

    def __init__(self, model: XAR, recorder: Callable[[], Record] | None = None) -> None:
        self.model = model
        self.grouping = model.grouping.to(model.rope.device)
        self._recorder = recorder
        self._recorded: RecordedPasses | None = None
        self._most_rows = 0

    @contextmanager
    def batch(self, labels: Tensor, guided: bool) -> Iterator[BatchNetwork]:
        """The velocity of a batch of images with these (B,) labels; ends the use of the one before.

        A batch that is smaller than one before, such as the last, is not worth compiling or recording for.
        """
        rows = len(labels) * (2 if guided else 1)
        smaller, self._most_rows = rows < self._most_rows, max(rows, self._most_rows)
        if self._recorder is not None and (self._recorded is None or rows > self._recorded.rows):
            cache = self.model.new_cache(rows, _compute_dtype(self.model))
            self._recorded = RecordedPasses(self._recorder(), cache)
        recorded = self._recorded if self._recorded is not None and rows == self._recorded.rows else None
        with torch.compiler.set_stance("eager_on_recompile" if smaller else "default"):
            yield BatchNetwork(self.model, labels, guided, recorded)


class BatchNetwork:
    """The velocity of one batch of images: their labels, their cache, both branches of guidance.

    Args:
        model: in eval mode, see `prepare_network`.
        labels: (B,) class labels.
        guided: whether there is a null branch; its rows follow the conditional ones.
        recorded: passes that are recorded for this number of rows, with the cache that they write.
    """

    def __init__(self, model: XAR, labels: Tensor, guided: bool, recorded: RecordedPasses | None = None) -> None:
        self.model, self.guided, self.batch = model, guided, labels.shape[0]
        self._rows = self.batch * (2 if guided else 1)
        self._classes = torch.cat([labels, labels.new_full((1,), model.null_label)]) if guided else labels
        self._recorded = recorded
        self._cache = recorded.empty_cache() if recorded else model.new_cache(self._rows, _compute_dtype(model))
        self._table: dict[float, Tensor] = {}
        self._room = table_bytes(labels.device)

    def velocity(self, x: Tensor, t: float, entity: int) -> Tensor:
        """Conditional velocity (B, N, C) of one entity at t, given all earlier ones."""
        return self._run(x, t, entity)

    def both_velocities(self, x: Tensor, t: float, entity: int) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional velocity, (B, N, C) each, in float32."""
        conditional, unconditional = self._run(torch.cat([x, x]), t, entity).float().chunk(2)
        return conditional, unconditional

    def commit(self, tokens: Tensor, entity: int) -> None:
        """Keep the keys and values of a finished entity (B, N, C): clean, at t = 0, for both branches."""
        self._run(torch.cat([tokens, tokens]) if self.guided else tokens, 0.0, entity)
        self._cache.commit(tokens.shape[1])

    def _run(self, x: Tensor, t: float, entity: int) -> Tensor:
        """One pass over the rows of x; the network's own forward with tabulated modulation."""
        modulation, cache = self.modulation(t)[:, : len(x)], self._cache.rows(len(x))

        def run(x: Tensor, modulation: Tensor) -> Tensor:
            return one_pass(self.model, x, modulation, entity, cache)

        if self._recorded is None:
            return run(x, modulation)
        return self._recorded(("pass", entity, cache.length, len(x), x.dtype), run, x, modulation)

    def modulation(self, t: float) -> Tensor:
        """Modulation (layers, rows, 1, 6 D) of all layers at t: computed once for each class and timestep."""
        if t in self._table:
            return self._table[t]
        times = torch.full((len(self._classes), 1), t, dtype=torch.float32, device=self._classes.device)
        if self._recorded is None:
            found = self._modulation(times, self._classes)
        else:
            found = self._recorded(("modulation", len(self._classes)), self._modulation, times, self._classes)
        if found.nbytes <= self._room:
            self._table[t] = found
            self._room -= found.nbytes
        return found

    def _modulation(self, times: Tensor, classes: Tensor) -> Tensor:
        condition = F.silu(self.model.condition(times, classes))  # (B + 1, 1, D)
        return torch.stack([self._for_rows(block.modulation(condition)) for block in _blocks(self.model)])

    def _for_rows(self, modulation: Tensor) -> Tensor:
        """From one row a class, the null class last, to one row for each row of a pass."""
        if not self.guided:
            return modulation
        return torch.cat([modulation[:-1], modulation[-1:].expand(self.batch, -1, -1)])


def one_pass(model: XAR, x: Tensor, modulation: Tensor, entity: int, cache: KVCache) -> Tensor:
    """The velocity (rows, N, C) of an entity's tokens x (rows, N, C), given modulation (layers, rows, 1, 6 D).

    Writes the entity's keys and values behind the committed ones of `cache`.
    """
    place, lengths = model.grouping.span(entity), (x.shape[1],)
    rope = model.rope[:, place]
    h = model.enter(x, place)
    for layer, block in enumerate(_blocks(model)):
        if layer == len(model.encoder):
            h = model.cross(h, place)
        h = block.update(h, modulation[layer], rope, lengths, cache.layer(layer))
    return model.leave(h)


class RecordedPasses:
    """Passes that are recorded at their second use and replayed from then on, for batches of one size.

    A GPU waits between the kernels of a small batch, because the host launches them one by one; a recorded pass is
    launched as one. Everything that it reads and writes has a fixed place: its inputs are copied there, and the cache
    is the same for all batches.

    Args:
        record: see `CudaGraphs`.
        cache: of all rows.
    """

    def __init__(self, record: Record, cache: KVCache) -> None:
        self._record, self._cache = record, cache
        self._seen: set[Any] = set()
        self._recorded: dict[Any, tuple[Replay, Tensor]] = {}
        self._places: dict[Any, list[Tensor]] = {}

    @property
    def rows(self) -> int:
        """Rows of the batches that it serves."""
        return self._cache.keys.shape[1]

    def empty_cache(self) -> KVCache:
        """The cache of these passes, with nothing committed."""
        return self._cache.rows(self.rows)

    def __call__(self, key: tuple[Any, ...], run: Run, *inputs: Tensor) -> Tensor:
        """What `run` gives for the inputs; `key` tells apart what differs in anything else than their values."""
        if key not in self._recorded and (key not in self._seen or len(self._recorded) == MOST_RECORDED):
            self._seen.add(key)  # the first time it may compile, which cannot be recorded
            return run(*inputs)
        places = self._places_of(inputs)
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        if key not in self._recorded:
            self._recorded[key] = self._record(lambda: run(*places))
        replay, result = self._recorded[key]
        replay()
        return result.clone()

    def _places_of(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Where inputs of these shapes are copied to; passes of one shape share them."""
        shapes = tuple((value.shape, value.dtype) for value in inputs)
        if shapes not in self._places:
            self._places[shapes] = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in inputs]
        return self._places[shapes]


class CudaGraphs:
    """Records passes as CUDA graphs, which share one pool of memory since they never run at the same time.

    The pool must not outlive its graphs: torch does not take up one again that has none left.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """What replays `run`, and where its result will be."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # other threads go on
            result = run()
        return graph.replay, result


def table_bytes(device: torch.device) -> float:
    """How much modulation is kept."""
    if device.type != "cuda":
        return TABLE_BYTES
    return torch.cuda.get_device_properties(device).total_memory * TABLE_SHARE


def _blocks(model: XAR) -> list[Block]:
    return cast("list[Block]", model.blocks)


def _compute_dtype(model: XAR) -> torch.dtype:
    """The dtype that linear layers give: autocast's where it is on, else the weights'."""
    weight = model.token_proj.weight
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
