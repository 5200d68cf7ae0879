"""`xar cache-latents`: make a latent cache; `verify` and `info` look at one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

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
    refuse_options_before_subcommand,
)
from xar_cli.cli.printing import print_rows

app = typer.Typer(
    help="Encode an image folder into a latent cache; `verify FILE` and `info FILE` look at one.",
    subcommand_metavar="[verify|info FILE]",
)
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Latent cache (latents.h5).")]


@app.callback(invoke_without_command=True)
def cache_latents(
    context: typer.Context,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Folder with one subfolder per class, or its .tar or .zip."),
    ] = None,
    from_mar: Annotated[
        Path | None,
        typer.Option("--from-mar", help="Take over a cache of MAR (npz files) instead of images."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Cache file to make or to continue.")] = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    tokenizer_weights: TokenizerWeightsOption = None,
    precision: Annotated[str, typer.Option(help="Arithmetic of kl16: fp32, bf16, and on a GPU tf32 or fp16.")] = "fp32",
    flip: Annotated[
        str | None, typer.Option(help="encode: store the mirror image too; none: do not. Default: as data.mirror.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32, as stored.")] = "float16",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out any number of unusable images.")] = False,
    max_bad: Annotated[int, typer.Option(help="Unusable images to leave out before the work ends.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Images encoded together; default by size.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode; default: this process's share of the cores.")
    ] = None,
    device: DeviceOption = "auto",
    nproc_per_node: NprocOption = 1,
    nnodes: NnodesOption = 1,
    node_rank: NodeRankOption = 0,
    rdzv_endpoint: RdzvEndpointOption = "",
    max_restarts: RestartsOption = 0,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Encode an image folder into a latent cache. Stopped at any point, the same command goes on from there.

    Unusable images are listed in OUT.bad.jsonl. Exit codes: 0 done, 1 failed (what was made is kept), 2 bad
    input.
    """
    if context.invoked_subcommand:
        refuse_options_before_subcommand(context)
        return
    from xar_cli.cache.plan import CacheSettings
    from xar_cli.cache.stage import plan_cache, require_few_bad
    from xar_cli.config import load_recipe
    from xar_cli.errors import UserError
    from xar_cli.hub import absolute_source
    from xar_cli.launch import LaunchOptions, find_place, run

    if (images is None) == (from_mar is None):
        raise UserError("Give --images or --from-mar, one of them.", "See `xar cache-latents --help`.")
    source = images or from_mar
    if source is None or out is None or recipe is None:
        missing = "--out" if out is None else "--recipe"
        raise UserError(f"{missing} is missing.", "See `xar cache-latents --help`.")
    config = load_recipe(recipe, overrides or ())
    settings = CacheSettings(
        images=source.absolute(),
        out=out.absolute(),
        config=config,
        from_mar=from_mar is not None,
        tokenizer_weights=tokenizer_weights and absolute_source(tokenizer_weights),
        precision=precision,
        flip=flip or ("encode" if config.data.mirror else "none"),
        dtype=dtype,
        max_bad=None if skip_bad else max_bad,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    launch = LaunchOptions(nproc_per_node, nnodes, node_rank, rdzv_endpoint, max_restarts)
    if dry_run:
        if find_place(launch).rank:  # rank 0 speaks for all
            return
        _print({"out": str(out), **plan_cache(settings).as_dict()}, as_json)
        return
    result = run("xar_cli.cache.stage:run_stage", settings, launch)
    if not result:  # one of several processes: the first one speaks for all
        return
    require_few_bad(settings, result["num_bad"])
    _print(result, as_json)


@app.command()
def verify(
    file: FileArgument,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    tokenizer_weights: TokenizerWeightsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a whole cache and check it: checksums, counts, classes, NaN, dead samples, statistics of the
    latents.

    With --recipe also whether that recipe can train on it; with --tokenizer-weights too, whether these made
    it. Exit code 0 for a sound cache, 1 for one with faults.
    """
    from xar_cli.cache.verify import verify_cache
    from xar_cli.config import load_recipe
    from xar_cli.errors import UserError
    from xar_cli.logs import setup_logs

    setup_logs()
    config = load_recipe(recipe, overrides or ()) if recipe else None
    identity = None
    if tokenizer_weights:
        import torch

        from xar_cli.tokenizer import load_tokenizer

        if config is None:
            raise UserError("--tokenizer-weights needs --recipe.", "Add the recipe that has this tokenizer.")
        identity = load_tokenizer(config, tokenizer_weights, torch.device("cpu")).identity
    verdict = verify_cache(file, config, identity)
    _print(verdict.as_dict(), as_json)
    if not verdict.ok:
        raise typer.Exit(1)


@app.command()
def info(file: FileArgument, as_json: JsonOption = False) -> None:
    """Print what a cache is: size, tokenizer, classes, how much of it is done. Reads no latents."""
    from xar_cli.cache.verify import inspect_cache

    _print(inspect_cache(file), as_json)


def _print(values: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values))
        return
    print_rows([[name.replace("_", " "), _text(value)] for name, value in values.items() if value is not None])


def _text(value: Any) -> str:
    """One value for a table: long lists are cut."""
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_text(item) for item in value[:8])
        return shown + (f", ... ({len(value)} in all)" if len(value) > 8 else "") or "none"
    if isinstance(value, dict):
        return " ".join(str(item) for item in value.values())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
