"""One guided network pass of xAR-B: ours, the plain transcription, and the matrix products alone as the floor.

    python -m benchmarks.one_pass --threads 1 --clock cpu

Batch 4, both branches: 8 rows of 64 tokens, with no context (first entity) and with three entities of it (last). Half a
minute for each precision, so it also serves on a busy machine: the fastest of a few runs of each is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

from benchmarks.sampling import build_ours, build_pair
from benchmarks.timing import CPU, add_clock_options, seconds, use_clock
from xar_cli.config import load_recipe
from xar_cli.precision import AUTOCAST_DTYPES, autocast
from xar_cli.sample.network import BatchNetwork

REPEATS = 4


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after a warm-up."""
    run()
    return min(seconds(run) for _ in range(REPEATS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    add_clock_options(parser)
    options = parser.parse_args()
    if use_clock(options).type != "cpu":
        raise SystemExit("This one measures a CPU: `benchmarks.sampling --no-plain` does for a GPU.")
    config = load_recipe("base")
    plain, state = build_pair(config)
    model = build_ours(config, state, options.precision, compiled=True).model
    x, t, labels = torch.randn(4, 64, config.latent_channels), torch.full((8, 1), 0.5), torch.arange(8)
    both = torch.cat([x, x])
    found = {}
    with torch.inference_mode(), autocast(options.precision, CPU):
        network = BatchNetwork(model, labels[:4], guided=True)
        found["ours_first_entity"] = fastest(lambda: network.both_velocities(x, 0.5, 0))
        found["plain_first_entity"] = fastest(lambda: plain(both, t, labels))
        for entity in range(3):
            network.commit(x, entity)
        _, context = plain(torch.randn(8, 192, config.latent_channels), torch.zeros(8, 3), labels)
        found["ours_last_entity"] = fastest(lambda: network.both_velocities(x, 0.5, 3))
        found["plain_last_entity"] = fastest(lambda: plain(both, t, labels, 3, context))
        dtype = AUTOCAST_DTYPES.get(options.precision, torch.float32)
        dim, hidden = config.model.dim, config.model.mlp_hidden
        shapes = ((dim, 3 * dim), (dim, dim), (dim, 2 * hidden), (hidden, dim))
        pairs = [(torch.randn(8, 64, a, dtype=dtype), torch.randn(b, a, dtype=dtype)) for a, b in shapes]
        found["matrix_products_alone"] = fastest(
            lambda: [torch.nn.functional.linear(a, b) for _ in model.blocks for a, b in pairs]
        )
    ratios = {
        f"plain_over_ours_{name}": found[f"plain_{name}"] / found[f"ours_{name}"]
        for name in ("first_entity", "last_entity")
    }
    print(json.dumps({"precision": options.precision, "clock": options.clock, "seconds": found, **ratios}, indent=2))


if __name__ == "__main__":
    main()
