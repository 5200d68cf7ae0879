"""Block-causal attention by runs of entities against one call with a dense mask: forward and backward, in pairs.

    python -m benchmarks.attention                       # xAR-B's heads on 256 tokens, this machine's device
    python -m benchmarks.attention --device cuda --precision bf16 --dropout 0.1 --compile

Both are compared before anything is timed, with their gradients and without dropout; with `--compile` both are
compiled, as training does it. K = 4 is the published cell, K = 256 one token an entity.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.timing import Timed, pairs, positive, require_agreement, say, spread, spread_text
from xar_cli.errors import UserError
from xar_cli.model.attention import block_causal_attention, block_causal_mask
from xar_cli.precision import AUTOCAST_DTYPES

TOKENS, HEADS, HEAD_DIM = 256, 12, 64
ENTITIES = (1, 4, 16, 64, 256)
BATCH = {"cpu": 8, "cuda": 64}
CALLS = {"cpu": 4, "cuda": 20}  # in one timing
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative distance of results and of gradients


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive, help="default: 8 on a CPU, 64 on a GPU")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--pairs", type=positive, default=7)
    parser.add_argument("--compile", action="store_true", help="both by torch.compile")
    timing.add_clock_options(parser, device="auto")
    return parser


@timing.command
def main() -> None:
    options = parser().parse_args()
    device = timing.use_clock(options)
    if not 0 <= options.dropout < 1:
        raise UserError(f"--dropout {options.dropout:g} is no probability in [0, 1).", "Training has 0.1.")
    dtype = AUTOCAST_DTYPES.get(options.precision, torch.float32)
    batch, calls = options.batch or BATCH[device.type], CALLS[device.type]

    def heads() -> Tensor:
        return torch.randn((batch, HEADS, TOKENS, HEAD_DIM), device=device, dtype=dtype, requires_grad=True)

    q, k, v, upstream = heads(), heads(), heads(), heads()
    found: dict[str, dict[str, Any]] = {}
    for entities in ENTITIES:
        lengths = (TOKENS // entities,) * entities
        mask = block_causal_mask(lengths, device=device)

        def dense(dropout: float, mask: Tensor = mask) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

        def runs(dropout: float, lengths: tuple[int, ...] = lengths) -> Tensor:
            return block_causal_attention(q, k, v, lengths, dropout)

        def step(attend: Callable[[float], Tensor], dropout: float) -> Callable[[], list[Tensor]]:
            attend = torch.compile(attend, dynamic=False) if options.compile else attend

            def run() -> list[Tensor]:
                for _ in range(calls):
                    result = attend(dropout)
                    gradients = torch.autograd.grad(result, (q, k, v), upstream.detach())
                return [result.detach(), *gradients]

            return run

        differences = [timing.distance(*pair) for pair in zip(step(runs, 0.0)(), step(dense, 0.0)(), strict=True)]
        require_agreement(f"K = {entities}: results or gradients", max(differences), TOLERANCE[options.precision])
        by_mask, by_runs = step(dense, options.dropout), Timed(step(runs, options.dropout))
        by_mask()
        by_runs()
        noise, by_runs.times = pairs(by_mask, by_mask, options.pairs), []
        ratios = pairs(by_mask, by_runs, options.pairs)
        found[f"K = {entities}"] = {
            "difference": max(differences),
            "milliseconds": 1000 * by_runs.median / calls,
            "dense_against_itself": spread(noise),
            "dense_time_over_runs": spread(ratios),
        }
        torch.compiler.reset()  # the graphs of one number of entities count against torch's limit
        say(f"K = {entities}: {found[f'K = {entities}']}")
    told = (f"{name} {spread_text(one['dense_time_over_runs'])}" for name, one in found.items())
    made = options.precision + (" compiled" if options.compile else "")
    print(json.dumps({
        **timing.machine(options, device),
        "batch": batch, "precision": options.precision, "dropout": options.dropout, "compiled": options.compile,
        "pairs": options.pairs,
        "results": found,
        "summary": f"dense over runs, {made}, dropout {options.dropout}: {', '.join(told)}",
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
