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
        typer.Option("--class", help="Classes by number, range or name: otter,281,0-9. Default: all."),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="How many images. Default: as many as --grid, else 64.")
    ] = None,
    unbalanced: Annotated[
        bool, typer.Option("--unbalanced", help="Allow a --count in which some class has no image.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise and labels: image i is always image i.")] = 0,
    solver: Annotated[
        str | None, typer.Option(help="euler_maruyama, euler, heun or multistep. Default: the recipe's.")
    ] = None,
    num_steps: Annotated[
        str | None,
        typer.Option(metavar="N or N:M", help="Network evaluations per entity: 40, or 40:15 from first to last."),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; 1 is none. Default: the recipe's.")
    ] = None,
    guidance_schedule: Annotated[
        str | None, typer.Option(help="linear, cosine or constant over the entities. Default: the recipe's.")
    ] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(metavar="LOW:HIGH", help="Timesteps t between which guidance applies: 0.1:0.8.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images drawn together. Default: the recipe's.")] = None,
    ema: Annotated[bool, typer.Option("--ema/--raw", help="Averaged or raw weights, where there are both.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the PNG files. Default: inside the run, else in ./samples.")
    ] = None,
    grid: Annotated[str | None, typer.Option("--grid", metavar="COLUMNSxROWS", help="Also make one picture.")] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Where the picture of --grid goes.")] = None,
    pack: Annotated[
        list[str] | None,
        typer.Option("--pack", metavar="npz|hdf5", help="Also put all images in one file; may be repeated."),
    ] = None,
    explain: Annotated[
        Path | None,
        typer.Option("--explain", metavar="PICTURE", help="Only draw how image 0 comes about, step by step."),
    ] = None,
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
    from xar_cli.launch import LaunchOptions, find_place, run
    from xar_cli.sample.explain import describe_explain
    from xar_cli.sample.request import (
        build_settings,
        check_balance,
        check_explain,
        check_picture,
        choose_count,
        parse_grid,
        parse_packs,
        sampling_overrides,
    )
    from xar_cli.sample.stage import describe_settings

    source = weights or run_folder
    if source is None or (weights and run_folder):
        raise UserError("One source of weights is needed.", "Give --run RUN, or --weights FILE.")
    if explain:
        check_picture("--explain", explain)
        check_explain(
            grid=grid, save=save, pack=pack, count=count, out=out,
            nproc_per_node=nproc_per_node if nproc_per_node > 1 else None, nnodes=nnodes if nnodes > 1 else None,
        )  # fmt: skip
    if save and not grid:
        raise UserError("--save names the picture of --grid, and --grid is missing.", "For example: --grid 8x4.")
    if save:
        check_picture("--save", save)
    cells = parse_grid(grid) if grid else None
    changes = sampling_overrides(
        solver=solver, num_steps=num_steps, guidance_scale=guidance_scale, guidance_schedule=guidance_schedule,
        guidance_interval=guidance_interval, batch_size=batch_size,
    )  # fmt: skip
    settings = build_settings(
        source, recipe, [*(overrides or ()), *changes], ema=ema, classes=classes, count=choose_count(count, cells),
        seed=seed, out=out, tokenizer_weights=tokenizer_weights, device=device, packs=parse_packs(pack or ()),
        grid=cells, picture=explain or save, at_least=count is None and not explain,
    )  # fmt: skip
    if count is not None and not unbalanced:
        check_balance(count, len(settings.classes))
    launch = LaunchOptions(nproc_per_node, nnodes, node_rank, rdzv_endpoint)
    if dry_run:
        if find_place(launch).rank:  # rank 0 speaks for all
            return
        plan = describe_explain(settings) if explain else describe_settings(settings)
        typer.echo(json.dumps(dict(plan))) if as_json else print_rows(plan)
        return
    result = run(f"xar_cli.sample.{'explain:explain' if explain else 'stage:sample'}", settings, launch)
    if not result:  # one of several processes: the first one speaks for all
        return
    if as_json:
        typer.echo(json.dumps(dict(result)))
    else:
        print_rows((key, str(value)) for key, value in result.items())
