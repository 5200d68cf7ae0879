"""Options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", "-r", help="Recipe name (`xar recipes list`) or a YAML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one recipe value; may be repeated."),
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder that `xar train --out` wrote.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto (CUDA where there is one), cpu, cuda or cuda:N.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")]
TokenizerWeightsOption = Annotated[
    Path | None,
    typer.Option("--tokenizer-weights", help="kl16.ckpt, the same as safetensors, or hf://owner/repo/file."),
]
NprocOption = Annotated[int, typer.Option("--nproc-per-node", help="Processes on each machine, one per GPU.")]
NnodesOption = Annotated[int, typer.Option("--nnodes", help="Machines.")]
NodeRankOption = Annotated[int, typer.Option("--node-rank", help="Number of this machine, from 0.")]
RdzvEndpointOption = Annotated[
    str, typer.Option("--rdzv-endpoint", metavar="HOST:PORT", help="Where the machines meet: machine 0.")
]
RestartsOption = Annotated[int, typer.Option("--max-restarts", help="Restarts after a failed process.")]
