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
    TokenizerWeightsOption,
)
from xar_cli.cli.printing import print_rows


def train(
    recipe: RecipeOption = None,
    data: Annotated[Path | None, typer.Option("--data", help="Latent cache made by `xar cache-latents`.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; one that exists is gone on with.")] = None,
    overrides: SetOption = None,
    init_from: Annotated[
        str | None, typer.Option("--init-from", help="Weights to start a new run from: file, run or hf:// name.")
    ] = None,
    max_batch_per_rank: Annotated[
        str | None, typer.Option(help="Images per forward pass on one rank, at most; or auto. Default: the recipe's.")
    ] = None,
    allow_recipe_change: Annotated[
        bool, typer.Option("--allow-recipe-change", help="Go on with a run although its recipe was changed.")
    ] = False,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Real images or statistics, for train.eval_every.")
    ] = None,
    inception_weights: Annotated[
        list[Path] | None, typer.Option("--inception-weights", help="Inception file, for train.eval_every.")
    ] = None,
    tokenizer_weights: TokenizerWeightsOption = None,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Copy the cache to memory first, once per machine.")
    ] = False,
    device: DeviceOption = "auto",
    nproc_per_node: NprocOption = 1,
    nnodes: NnodesOption = 1,
    node_rank: NodeRankOption = 0,
    rdzv_endpoint: RdzvEndpointOption = "",
    max_restarts: RestartsOption = 0,
    rdzv_timeout: Annotated[int, typer.Option(min=1, help="Seconds that processes wait for each other.")] = 600,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe on a latent cache. Stopped at any point, the same command goes on from there.

    Exit codes: 0 done, 1 failed, 2 bad input; stopped with a checkpoint written: 130 by Ctrl-C, 143 by SIGTERM, 138 by
    SIGUSR1, 129 by SIGHUP.
    """
    from xar_cli.config import load_recipe
    from xar_cli.errors import UserError
    from xar_cli.launch import LaunchOptions, find_place, run
    from xar_cli.train.loop import TrainSettings, dry_run_plan
    from xar_cli.train.plan import describe_plan
    from xar_cli.train.preview import Measure

    if recipe is None:
        raise UserError("--recipe is missing.", "See `xar recipes list`.")
    batch = [f"train.max_batch_per_rank={max_batch_per_rank}"] if max_batch_per_rank else []
    config = load_recipe(recipe, [*(overrides or ()), *batch])
    launch = LaunchOptions(nproc_per_node, nnodes, node_rank, rdzv_endpoint, max_restarts, rdzv_timeout)
    place = find_place(launch)
    out = out or Path("runs") / config.name
    measure = Measure(inception_weights=tuple(inception_weights or ()))
    if dry_run:
        if place.rank:  # rank 0 speaks for all
            return
        plan = dry_run_plan(
            config, data, out, place.world_size, allow_recipe_change, device, place.ranks_here,
            init_from, reference, measure, tokenizer_weights,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(plan.as_dict()))
        else:
            print_rows(describe_plan(config, plan, out))
        return
    if data is None:
        raise UserError("--data is missing.", "Give the latent cache that `xar cache-latents --out` wrote.")
    settings = TrainSettings(
        config=config,
        data=data.absolute(),
        out=out.absolute(),
        device=device,
        in_memory=in_memory,
        init_from=init_from,
        allow_recipe_change=allow_recipe_change,
        tokenizer_weights=tokenizer_weights,
        reference=reference,
        measure=measure,
        timeout=rdzv_timeout,
    )
    result = run("xar_cli.train.loop:train", settings, launch)
    if not place.rank:
        typer.echo(json.dumps(result) if as_json else f"Trained {result['steps']} steps: {result['run']}")
