"""Block-causal attention by runs of entities against one call with a dense mask: forward and backward, in pairs.

    python -m benchmarks.attention                       # xAR-B's heads on 256 tokens, this machine's device
    python -m benchmarks.attention --device cuda --precision bf16 --dropout 0.1

Both are compared before anything is timed. K = 4 is the published cell, K = 256 one token an entity.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sampling import add_clock_options, pairs, spread, use_clock
from xar_cli.distributed import pick_device
from xar_cli.model.attention import block_causal_attention, block_causal_mask
from xar_cli.precision import AUTOCAST_DTYPES

TOKENS, HEADS, HEAD_DIM = 256, 12, 64
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--pairs", type=int, default=7)
    add_clock_options(parser)
    options = parser.parse_args()
    use_clock(options)
    device, dtype = pick_device(options.device), AUTOCAST_DTYPES.get(options.precision, torch.float32)

    def heads() -> Tensor:
        shape = (options.batch, HEADS, TOKENS, HEAD_DIM)
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    q, k, v, upstream = heads(), heads(), heads(), heads()
    found = {}
    for entities in (1, 4, 16, 64, 256):
        lengths = (TOKENS // entities,) * entities
        mask = block_causal_mask(lengths, device=device)

        def dense(dropout: float, mask: Tensor = mask) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

        def runs(dropout: float, lengths: tuple[int, ...] = lengths) -> Tensor:
            return block_causal_attention(q, k, v, lengths, dropout)

        def step(attend: Callable[[float], Tensor]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(4):
                    attend(options.dropout).backward(upstream.detach())
                if device.type == "cuda":
                    torch.cuda.synchronize()

            return run

        difference = float((dense(0.0) - runs(0.0)).abs().max())
        if difference > TOLERANCE[options.precision]:
            raise SystemExit(f"K = {entities}: they differ by {difference:.1e}: no speed is printed.")
        step(dense)(), step(runs)()
        found[f"K = {entities}"] = {
            "difference": difference,
            "dense_against_itself": spread(pairs(step(dense), step(dense), 3)),
            "dense_time_over_runs": spread(pairs(step(dense), step(runs), options.pairs)),
        }
    print(json.dumps({"device": str(device), "torch": torch.__version__, **vars(options), "results": found}, indent=2))


if __name__ == "__main__":
    main()
