"""What the sampler does, counted from a trace: kernels, bytes, FLOP, graphs, copies of the cache. No clock.

    python -m benchmarks.structure            # prints the counts, ours and the plain transcription's
    python -m benchmarks.structure --check    # and fails where one has grown past its limit

The counts are the same on every machine and under any load, so this is what gates in CI; times do not. The network is
small, with xAR's 4 cells on the 16 x 16 grid, guidance, bf16, on the CPU; counts of kernels do not depend on its width.
Kernels and bytes are those of the eager network with plain weights; compiling and packing only take away from them.
Attention is compared in its fused form, as a GPU has it, ours and the plain one's; its FLOP, which torch does not count
in that form, are those of its two products (`flop_over_counted`).
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain
from benchmarks.sampling import Noise, build_ours, build_pair
from benchmarks.timing import CPU
from xar_cli.config import Config, load_recipe
from xar_cli.model import attention
from xar_cli.model.transformer import Block
from xar_cli.precision import autocast
from xar_cli.sample.network import (
    PARTS_AROUND_ATTENTION,
    PARTS_BETWEEN_PRODUCTS,
    BatchNetwork,
    replace_parts,
)
from xar_cli.sample.plan import SamplingPlan, flops_per_image
from xar_cli.sample.sampler import sample_latents

BATCH, STEPS = 2, 3
VIEWS = {
    "view", "_unsafe_view", "expand", "slice", "select", "transpose", "permute", "t", "unsqueeze", "squeeze", "split",
    "chunk", "unbind", "detach", "alias", "as_strided", "split_with_sizes", "unflatten", "empty", "empty_like",
}  # no data is touched  # fmt: skip
COPIES = {
    "copy_", "clone", "_to_copy", "cat", "stack", "index", "index_select", "gather", "index_put_", "index_copy_",
    "scatter_", "slice_scatter", "constant_pad_nd", "repeat",
}  # keys and values go from place to place  # fmt: skip

# Limits of the counts below: of ours, for BATCH and STEPS. Raise one only with a reason in the commit.
LIMITS = {
    "flop_over_counted": 1.01,
    "flop_over_plain": 0.9,
    "kernels_per_block": 63,
    "kernels_per_block_over_plain": 0.9,
    "bytes_over_plain": 0.7,
    "weight_casts": 0,
    "cache_concatenations": 0,
    "cache_bytes_copied_over_new": 1.0,
    "graphs_per_shape": 2,
    "graphs_per_shape_between_products": 5,
}


class Trace(TorchDispatchMode):
    """Counts every kernel that touches data, and the bytes that it reads and writes.

    Args:
        weights: where the parameters begin whose casts are counted.
        cache: where the storages of the cache begin, copies out of which and into which are counted.
    """

    def __init__(self, weights: set[int], cache: set[int] | None = None) -> None:
        super().__init__()
        self._weights, self._cache = weights, cache or set()
        self.cache_bytes = 0
        self.kernels: dict[str, int] = {}
        self.bytes = 0
        self.weight_casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the kernel and note it."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in VIEWS:
            self.kernels[name] = self.kernels.get(name, 0) + 1
            self.bytes += sum(tensor.nbytes for tensor in _tensors((args, result)))
            touched = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, result))}
            if name in COPIES and touched & self._cache:
                self.cache_bytes += sum(tensor.nbytes for tensor in _tensors(result))
            if name == "_to_copy" and args[0].data_ptr() in self._weights:
                self.weight_casts += 1
        return result

    @property
    def count(self) -> int:
        """All kernels."""
        return sum(self.kernels.values())


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


@torch.no_grad()
def traced(run: Callable[[], object], model: torch.nn.Module) -> Trace:
    """The trace of a call; casts of this model's weights are counted."""
    with Trace({parameter.data_ptr() for parameter in model.parameters()}) as trace:
        run()
    return trace


def flop_of(run: Callable[[], object]) -> int:
    """FLOP of a call, as torch's own counter has them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as one kernel on the CPU too."""
    with mock.patch.object(attention, "MOST_PAIRS_UNFUSED", 0):
        yield


def small_config() -> Config:
    """A narrow network of xAR's form."""
    return load_recipe("base", ["model={dim: 96, depth: 2, heads: 2}", f"sample.num_steps={STEPS}"])


def count() -> dict[str, Any]:
    """All counts, of ours and of the plain transcription."""
    config = small_config()
    network, state = build_pair(config)
    ours = build_ours(config, state, "bf16", compiled=False, packed=False)
    model = ours.model
    noise = Noise(config, BATCH, STEPS)
    labels, plan = torch.arange(BATCH), SamplingPlan.of(config)

    def run_ours() -> Tensor:
        with autocast("bf16", CPU):
            # Without its inference mode, under which composite operations count as one, unlike those of the plain code.
            return inspect.unwrap(sample_latents)(ours, labels, noise, plan)

    def run_plain() -> Tensor:
        with autocast("bf16", CPU):
            return plain.sample(network, labels, *noise.for_plain(), STEPS, config.sample.guidance_scale)

    with fused_attention():
        trace, plain_trace = traced(run_ours, model), traced(run_plain, network)
        flop_over_plain = flop_of(run_ours) / flop_of(run_plain)
    passes = sum(plan.num_steps) + plan.evaluations().commits // 2
    per_block = trace.count / passes / len(model.blocks)
    plain_per_block = plain_trace.count / sum(plan.num_steps) / len(model.blocks)
    flop = flop_of(run_ours)
    copied, new = cache_traffic(config)
    return {
        "kernels": trace.count,
        "kernels_per_block": per_block,
        "kernels_per_block_over_plain": per_block / plain_per_block,
        "megabytes": trace.bytes / 1e6,
        "bytes_over_plain": trace.bytes / plain_trace.bytes,
        "weight_casts": trace.weight_casts,
        "plain_weight_casts": plain_trace.weight_casts,
        "cache_concatenations": cache_concatenations(config, trace),
        "cache_bytes_copied_over_new": copied / new,
        "megaflop_per_image": flop / BATCH / 1e6,
        "flop_over_counted": flop / BATCH / flops_per_image(config, plan),
        "flop_over_plain": flop_over_plain,
        **graph_counts(config, state),
    }


def cache_concatenations(config: Config, trace: Trace) -> int:
    """Concatenations beyond those that a pass without a cache needs: two of rows and one of entities."""
    steps, entities = STEPS, 4
    guided = (entities - 1) * steps + (entities - 1)  # passes whose input holds both branches
    tables = (STEPS + 1) * 2 * config.model.depth + 1 + STEPS + 1  # modulation rows; classes; sinusoids
    allowed = guided + tables + 1 + entities  # the sequence; the noise
    return max(0, trace.kernels.get("cat", 0) - allowed)


def cache_traffic(config: Config) -> tuple[int, int]:
    """Bytes of keys and values copied in one pass at the end of a sequence, and bytes of those that are new."""
    _, state = build_pair(config)
    model = build_ours(config, state, "bf16", compiled=False, packed=False).model
    with torch.no_grad(), autocast("bf16", CPU), fused_attention():
        network = BatchNetwork(model, torch.arange(BATCH), guided=True)
        x = torch.randn(BATCH, 64, config.latent_channels)
        for entity in range(3):
            network.commit(x, entity)
        network.modulation(0.5)
        cache = {tensor.untyped_storage().data_ptr() for tensor in (network._cache.keys, network._cache.values)}
        with Trace(set(), cache) as trace:
            network.both_velocities(x, 0.5, 3)
    new = 2 * len(model.blocks) * 2 * BATCH * 64 * config.model.dim * 2
    return trace.cache_bytes, new


def graph_counts(config: Config, state: dict[str, Tensor]) -> dict[str, int]:
    """Graphs of the compiled parts of a block, over all layers, for one shape: both ways to cut it."""
    return {
        "graphs_per_shape": graphs_of(PARTS_AROUND_ATTENTION, config, state),
        "graphs_per_shape_between_products": graphs_of(PARTS_BETWEEN_PRODUCTS, config, state),
    }


def graphs_of(parts: tuple[str, ...], config: Config, state: dict[str, Tensor]) -> int:
    """How many graphs serve these parts of all blocks; a graph break is an error."""
    torch._dynamo.reset()
    model = build_ours(config, state, "bf16", compiled=False, packed=False).model
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for block in cast("list[Block]", model.blocks):
        replace_parts(block, parts, lambda part: torch.compile(part, backend=backend, dynamic=False, fullgraph=True))
    with torch.inference_mode(), autocast("bf16", CPU):
        network = BatchNetwork(model, torch.arange(BATCH), guided=False)
        for entity in range(3):
            x = torch.randn(BATCH, 64, config.latent_channels)
            network.velocity(x, 0.5, entity)
            network.commit(x, entity)
    return graphs


def past_limits(counts: dict[str, Any]) -> list[str]:
    """What has grown past its limit, in words."""
    return [
        f"{name} is {counts[name]:g}, its limit {limit:g}" for name, limit in LIMITS.items() if counts[name] > limit
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts = count()
    print(json.dumps(counts, indent=2))
    past = past_limits(counts)
    if options.check and past:
        raise SystemExit("The sampler does more than it did:\n  " + "\n  ".join(past))


if __name__ == "__main__":
    main()
