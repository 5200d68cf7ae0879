"""`xar sample`: from a run or from weights to images."""

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
    RunOption,
    SetOption,
    TokenizerWeightsOption,
)
from xar_cli.cli.printing import print_rows


def sample(
    run_folder: RunOption = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="Weights instead of a run: a file or hf://owner/repo/file."),
    ] = None,
    recipe: RecipeOption = None,
    classes: Annotated[
        str | None,
        typer.Option("--class", help="Classes by number, range or name: otter,360,0-9. Default: all."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise and labels: image i is always image i.")] = 0,
    solver: Annotated[str | None, typer.Option(help="euler_maruyama or euler. Default: the recipe's.")] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="Network evaluations per entity. Default: the recipe's.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is none. Default: the recipe's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images drawn together. Default: the recipe's.")] = None,
    ema: Annotated[bool, typer.Option("--ema/--raw", help="Averaged or raw weights, where there are both.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the PNG files. Default: inside the run.")
    ] = None,
    grid: Annotated[str | None, typer.Option("--grid", metavar="COLUMNSxROWS", help="Also make one picture.")] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Where the picture of --grid goes.")] = None,
    tokenizer_weights: TokenizerWeightsOption = None,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    nproc_per_node: NprocOption = 1,
    nnodes: NnodesOption = 1,
    node_rank: NodeRankOption = 0,
    rdzv_endpoint: RdzvEndpointOption = "",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw images from a run (--run) or from weights (--weights). Only images that are missing are made."""
    from xar_cli.errors import UserError
    from xar_cli.launch import LaunchOptions, run
    from xar_cli.sample.request import build_settings, parse_grid
    from xar_cli.sample.stage import describe_settings, save_grid

    source = weights or run_folder
    if source is None or (weights and run_folder):
        raise UserError("One source of weights is needed.", "Give --run RUN, or --weights FILE.")
    chosen = {
        "solver": solver, "num_steps": num_steps, "guidance_scale": guidance_scale, "batch_size": batch_size,
    }  # fmt: skip
    columns, rows = parse_grid(grid) if grid else (0, 0)
    settings = build_settings(
        source, recipe, [*(overrides or ()), *(f"sample.{key}={value}" for key, value in chosen.items() if value is not None)],
        ema=ema, classes=classes, count=max(count, columns * rows), seed=seed, out=out,
        tokenizer_weights=tokenizer_weights, device=device,
    )  # fmt: skip
    if dry_run:
        plan = describe_settings(settings)
        typer.echo(json.dumps(dict(plan))) if as_json else print_rows(plan)
        return
    launch = LaunchOptions(nproc_per_node, nnodes, node_rank, rdzv_endpoint)
    result = dict(run("xar_cli.sample.stage:sample", settings, launch))
    if columns:
        result["grid"] = str(save or settings.out.with_name(f"{settings.out.name}-grid.png"))
        save_grid(settings.out, columns * rows, columns, Path(result["grid"]))
    if as_json:
        typer.echo(json.dumps(result))
    else:
        print_rows((key, str(value)) for key, value in result.items())
