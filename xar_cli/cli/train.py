"""`xar train`: from a latent cache to a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from xar_cli.cli.options import (
    DeviceOption,
    DryRunOption,
    JsonOption,
    NnodesOption,
    NodeRankOption,
    NprocOption,
    RdzvEndpointOption,
    RecipeOption,
    RestartsOption,
    SetOption,
)
from xar_cli.cli.printing import print_rows


def train(
    recipe: RecipeOption = None,
    data: Annotated[Path | None, typer.Option("--data", help="Latent cache made by `xar cache-latents`.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; one that exists is gone on with.")] = None,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    nproc_per_node: NprocOption = 1,
    nnodes: NnodesOption = 1,
    node_rank: NodeRankOption = 0,
    rdzv_endpoint: RdzvEndpointOption = "",
    max_restarts: RestartsOption = 0,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe on a latent cache. Stopped at any point, the same command goes on from there.

    Exit codes: 0 done, 1 failed, 2 bad input, 130 stopped by Ctrl-C and 143 by SIGTERM (a checkpoint is written).
    """
    from xar_cli.config import load_recipe
    from xar_cli.errors import UserError
    from xar_cli.launch import LaunchOptions, run
    from xar_cli.train.loop import TrainSettings, dry_run_plan
    from xar_cli.train.plan import describe_plan

    if recipe is None:
        raise UserError("--recipe is missing.", "See `xar recipes list`.")
    config = load_recipe(recipe, overrides or ())
    launch = LaunchOptions(nproc_per_node, nnodes, node_rank, rdzv_endpoint, max_restarts)
    launch.check()
    out = out or Path("runs") / config.name
    if dry_run:
        plan = dry_run_plan(config, data, out, launch.world_size)
        if as_json:
            typer.echo(json.dumps(plan.as_dict()))
        else:
            print_rows(describe_plan(config, plan, out))
        return
    if data is None:
        raise UserError("--data is missing.", "Give the latent cache that `xar cache-latents --out` wrote.")
    settings = TrainSettings(config=config, data=data.absolute(), out=out.absolute(), device=device)
    result = run("xar_cli.train.loop:train", settings, launch)
    typer.echo(json.dumps(result) if as_json else f"Trained {result['steps']} steps: {result['run']}")
