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


def refuse_options_before_subcommand(context: typer.Context) -> None:
    """Raise a UserError at an option of the main job in front of a subcommand, which has options of its own."""
    from xar_cli.errors import UserError

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            option, word = parameter.opts[0], context.invoked_subcommand
            raise UserError(
                f"{option} stands before `{word}`, which would not see it.", f"Write {option} after `{word}`."
            )
