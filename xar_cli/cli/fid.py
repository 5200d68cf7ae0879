"""`xar fid`: numbers for images against a reference, with the protocol beside each; `stats`, `sweep`, `doctor`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xar_cli.cli.options import (
    DeviceOption,
    JsonOption,
    NnodesOption,
    NodeRankOption,
    NprocOption,
    RdzvEndpointOption,
    RunOption,
    TokenizerWeightsOption,
    refuse_options_before_subcommand,
)
from xar_cli.cli.printing import print_rows

if TYPE_CHECKING:
    from xar_cli.evaluate import Settings

app = typer.Typer(help="Judge images against a reference: FID and more, by named protocols.")

SamplesOption = Annotated[
    Path | None, typer.Option("--samples", help="Generated images: a folder, an ADM .npz, or an HDF5 file.")
]
ReferenceOption = Annotated[
    Path | None, typer.Option("--reference", help="Real images: a folder, an ADM batch, or statistics (.npz).")
]
ProtocolOption = Annotated[
    list[str] | None,
    typer.Option(
        "--protocol",
        help="adm, torch-fidelity, clean-fid, digits; several with commas. Default: adm; with --run the recipe's.",
    ),
]
CountOption = Annotated[
    int | None, typer.Option("--count", min=2, help="Images to use. Default: all; with --run evaluate.count.")
]
StatsCountOption = Annotated[int | None, typer.Option("--count", min=2, help="Images to use. Default: all.")]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(
        "--image-size", metavar="SIDE or HEIGHTxWIDTH", help="Take ADM's centre crop of this size from image files."
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Images per pass. Default: 64; with --run the recipe's, for draws too."),
]
StatsBatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Images per pass. Default: 64.")]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Threads that decode images.")]
PrecisionOption = Annotated[str, typer.Option("--precision", help="fp32, or bf16 for a quick look.")]
CompileOption = Annotated[str, typer.Option("--compile", help="auto (from 1,000 images on), on or off.")]
ErrorBarsOption = Annotated[str, typer.Option("--error-bars", help="subsets, bootstrap or none.")]
ExtrapolateOption = Annotated[
    bool, typer.Option("--fid-infinity", help="Also estimate the FID of infinitely many samples.")
]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")]
InceptionOption = Annotated[
    list[Path] | None,
    typer.Option("--inception-weights", help="torch-fidelity's .pth or clean-fid's .pt; may be repeated."),
]
VGG16Option = Annotated[Path | None, typer.Option("--vgg16-weights", help="torchvision's vgg16-397923af.pth.")]
DownloadOption = Annotated[bool, typer.Option("--download", help="Fetch missing weights, checked by sha256.")]
CacheOption = Annotated[
    Path | None, typer.Option("--feature-cache", help="Folder of features. Default: ~/.cache/xar/features.")
]
NoCacheOption = Annotated[bool, typer.Option("--no-feature-cache", help="Keep no features.")]


@app.callback(invoke_without_command=True)
def fid(
    context: typer.Context,
    samples: SamplesOption = None,
    run_folder: RunOption = None,
    reference: ReferenceOption = None,
    protocol: ProtocolOption = None,
    report: Annotated[Path | None, typer.Option("--report", help="Folder for report.html, .md and .json.")] = None,
    count: CountOption = None,
    image_size: ImageSizeOption = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --run: seed of noise and labels. Default: 0.")] = None,
    tokenizer_weights: TokenizerWeightsOption = None,
    batch_size: BatchOption = None,
    workers: WorkersOption = 4,
    precision: PrecisionOption = "fp32",
    compile_mode: CompileOption = "auto",
    error_bars: ErrorBarsOption = "subsets",
    extrapolate: ExtrapolateOption = False,
    skip_bad: SkipBadOption = False,
    inception_weights: InceptionOption = None,
    vgg16_weights: VGG16Option = None,
    download: DownloadOption = False,
    feature_cache: CacheOption = None,
    no_feature_cache: NoCacheOption = False,
    device: DeviceOption = "auto",
    nproc_per_node: NprocOption = 1,
    nnodes: NnodesOption = 1,
    node_rank: NodeRankOption = 0,
    rdzv_endpoint: RdzvEndpointOption = "",
    as_json: JsonOption = False,
) -> None:
    """Measure --samples (or images drawn from --run, which are not written) against --reference."""
    if context.invoked_subcommand is not None:
        refuse_options_before_subcommand(context)
        return
    from xar_cli.errors import UserError
    from xar_cli.evaluate.stage import FidSettings
    from xar_cli.launch import LaunchOptions, run

    if (samples is None) == (run_folder is None):
        raise UserError("One set of samples is needed.", "Give --samples FOLDER, or --run RUN to draw them.")
    if reference is None:
        raise UserError("--reference is missing.", "Give real images, or statistics made by `xar fid stats`.")
    drawing = [("--seed", seed), ("--tokenizer-weights", tokenizer_weights)]
    unread = [option for option, value in drawing if samples is not None and value is not None]
    if unread:
        raise UserError(
            f"--samples are images that exist: {' and '.join(unread)} would not be read.",
            f"Leave {'it' if len(unread) == 1 else 'them'} away, or draw with --run.",
        )
    measure = _measure(
        count=count if samples else None, image_size=_parse_size(image_size), batch_size=batch_size, workers=workers,
        precision=precision, compile=compile_mode, error_bars=error_bars, extrapolate=extrapolate, skip_bad=skip_bad,
        inception_weights=tuple(inception_weights or ()), vgg16_weights=vgg16_weights, download=download,
        feature_cache=_cache_folder(feature_cache, no_feature_cache),
    )  # fmt: skip
    launch = LaunchOptions(nproc_per_node, nnodes, node_rank, rdzv_endpoint)
    names = tuple(protocol or ("adm",))
    if samples is not None:
        settings = FidSettings(
            samples=samples, reference=reference, protocols=names, measure=measure, report=report, device=device
        )
        result = run("xar_cli.evaluate.stage:fid", settings, launch)
    else:
        from xar_cli.score_run import RunSettings

        of_run = RunSettings(
            run=run_folder, reference=reference, protocols=names if protocol else (), count=count, seed=seed or 0,
            tokenizer_weights=tokenizer_weights, measure=measure, batch_size=batch_size, report=report, device=device,
        )  # fmt: skip
        result = run("xar_cli.score_run:fid_of_run", of_run, launch)
    if result:
        typer.echo(json.dumps(result)) if as_json else _print_result(result)
        if "report_failure" in result:
            raise UserError(result["report_failure"], "Mend that, or give another --report.", exit_code=1)


@app.command()
def stats(
    images: Annotated[Path, typer.Argument(help="Folder of real images, or an ADM batch.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .npz file to write.")],
    protocol: Annotated[str, typer.Option("--protocol", help="One: adm, torch-fidelity, clean-fid or digits.")] = "adm",
    count: StatsCountOption = None,
    image_size: ImageSizeOption = None,
    batch_size: StatsBatchOption = None,
    workers: WorkersOption = 4,
    compile_mode: CompileOption = "auto",
    skip_bad: SkipBadOption = False,
    inception_weights: InceptionOption = None,
    download: DownloadOption = False,
    feature_cache: CacheOption = None,
    no_feature_cache: NoCacheOption = False,
    device: DeviceOption = "auto",
    nproc_per_node: NprocOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Write the statistics of real images (mu, sigma, mu_s, sigma_s), to be used as --reference."""
    from xar_cli.data.images import printable
    from xar_cli.evaluate.stage import StatisticsSettings
    from xar_cli.launch import LaunchOptions, run

    measure = _measure(
        count=count, image_size=_parse_size(image_size), batch_size=batch_size, workers=workers, compile=compile_mode,
        skip_bad=skip_bad, inception_weights=tuple(inception_weights or ()), download=download,
        feature_cache=_cache_folder(feature_cache, no_feature_cache),
    )  # fmt: skip
    settings = StatisticsSettings(images=images, out=out, protocol=protocol, measure=measure, device=device)
    result = run("xar_cli.evaluate.stage:statistics", settings, LaunchOptions(nproc_per_node))
    if result:
        told = f"{printable(result['statistics'])}: {result['count']} images by the network '{result['network']}'"
        typer.echo(json.dumps(result) if as_json else told)


@app.command()
def doctor(
    inception_weights: InceptionOption = None, vgg16_weights: VGG16Option = None, as_json: JsonOption = False
) -> None:
    """Say which protocols can run here, with which weights, and what is missing. Nothing is fetched."""
    from xar_cli.evaluate import Settings
    from xar_cli.evaluate.stage import doctor as examine
    from xar_cli.launch import LaunchOptions, find_place

    if find_place(LaunchOptions()).rank:  # rank 0 speaks for all
        return
    found = examine(Settings(inception_weights=tuple(inception_weights or ()), vgg16_weights=vgg16_weights))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, protocol in found.items():
        typer.echo(f"{name}: {'can run' if protocol['runs'] else 'cannot run'}. {protocol['what']}.")
        for network, weights in protocol["weights"].items():
            typer.echo(f"  {network}: {weights}")
        for missing in protocol["missing"]:
            typer.echo(f"  {missing}")


@app.command()
def sweep(
    run_folder: Annotated[Path, typer.Option("--run", help="Run folder that `xar train --out` wrote.")],
    reference: Annotated[Path, typer.Option("--reference", help="Real images, or statistics of them.")],
    guidance_scale: Annotated[
        str | None, typer.Option("--guidance-scale", metavar="A:B:STEP", help="Range or list: 1.5:3:0.25, or 1,2.")
    ] = None,
    num_steps: Annotated[
        str | None,
        typer.Option("--num-steps", metavar="LIST", help="Network evaluations per entity: 20,40 or 40,40:15."),
    ] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="One protocol. Default: the recipe's.")] = None,
    count: Annotated[int, typer.Option("--count", min=2, help="Images per point.")] = 10_000,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results. Default: RUN/sweep.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise and labels.")] = 0,
    tokenizer_weights: TokenizerWeightsOption = None,
    batch_size: BatchOption = None,
    inception_weights: InceptionOption = None,
    download: DownloadOption = False,
    feature_cache: CacheOption = None,
    no_feature_cache: NoCacheOption = False,
    device: DeviceOption = "auto",
    nproc_per_node: NprocOption = 1,
    nnodes: NnodesOption = 1,
    node_rank: NodeRankOption = 0,
    rdzv_endpoint: RdzvEndpointOption = "",
    as_json: JsonOption = False,
) -> None:
    """Draw and score every combination of settings; points that are done already are kept."""
    from xar_cli.evaluate.sweep import parse_numbers, parse_steps
    from xar_cli.launch import LaunchOptions, run
    from xar_cli.score_run import SweepSettings

    measure = _measure(
        batch_size=batch_size, inception_weights=tuple(inception_weights or ()), download=download,
        feature_cache=_cache_folder(feature_cache, no_feature_cache),
    )  # fmt: skip
    settings = SweepSettings(
        run=run_folder, reference=reference, protocols=(protocol,) if protocol else (), count=count, seed=seed,
        tokenizer_weights=tokenizer_weights, measure=measure, batch_size=batch_size, device=device, out=out,
        guidance_scales=parse_numbers(guidance_scale),
        step_counts=parse_steps(num_steps),
    )  # fmt: skip
    result = run(
        "xar_cli.score_run:sweep_of_run", settings, LaunchOptions(nproc_per_node, nnodes, node_rank, rdzv_endpoint)
    )
    if result:
        typer.echo(json.dumps(result) if as_json else result["text"])


def _measure(*, batch_size: int | None, **values: Any) -> Settings:
    """`Settings` from options, with their own batch size where none is given; a wrong value becomes a UserError."""
    from pydantic import ValidationError

    from xar_cli.errors import UserError
    from xar_cli.evaluate import Settings

    try:
        return Settings(**values, **({} if batch_size is None else {"batch_size": batch_size}))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{name}: {first['msg']}, not '{first['input']}'.", "See `xar fid --help`.") from None


def _parse_size(text: str | None) -> tuple[int, int] | None:
    """'256' -> (256, 256), '256x384' -> (256, 384): height and width."""
    from xar_cli.errors import UserError

    if text is None:
        return None
    height, x, width = text.lower().partition("x")
    if not (height.isdecimal() and int(height) and (not x or (width.isdecimal() and int(width)))):
        raise UserError(
            f"'--image-size {text}' is neither SIDE nor HEIGHTxWIDTH.", "For example: --image-size 256, or 256x384."
        )
    return int(height), int(width or height)


def _cache_folder(given: Path | None, none: bool) -> Path | None:
    """Where features are kept: as given, else below the user's cache folder."""
    import os

    if none:
        return None
    return given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xar" / "features"


def _print_result(result: Mapping[str, Any]) -> None:
    from xar_cli.data.images import printable
    from xar_cli.evaluate.report import show_number

    samples, reference = result["samples"], result["reference"]
    typer.echo(f"samples:   {samples['name']} ({samples['count']} images)")
    counted = f"{reference['count']} images" if reference["count"] else "statistics"
    typer.echo(f"reference: {reference['name']} ({counted})")
    for side in (samples, reference):
        if side["skipped"]:
            typer.echo(f"left out of {side['name']}: {len(side['skipped'])} that could not be read")
    rows = [
        (name, metric["name"], show_number(metric["value"], metric["error"]), metric["note"])
        for name, protocol in result["protocols"].items()
        for metric in protocol["metrics"].values()
    ]
    print_rows(rows, ("protocol", "metric", "value", "what else"))
    for kind, path in result.get("report", {}).items():
        typer.echo(f"{kind}: {printable(path)}")
