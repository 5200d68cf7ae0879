"""A folder to push to the hub: the weights with their recipe inside, the recipe as YAML, and a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xar_cli.config.recipes import dump_config
from xar_cli.errors import UserError
from xar_cli.hub import is_sha256
from xar_cli.weights.export import export_weights
from xar_cli.weights.files import WeightsFile
from xar_cli.weights.info import num_parameters

WEIGHTS_NAME = "model.safetensors"


def write_model_folder(
    weights: WeightsFile, repo: str, results: Sequence[Mapping[str, Any]], licence: str | None, folder: Path
) -> None:
    """Write what `xar weights push` uploads: model.safetensors, recipe.yaml and README.md."""
    export_weights(weights, folder / WEIGHTS_NAME)
    (folder / "recipe.yaml").write_text(dump_config(weights.config), encoding="utf-8")
    (folder / "README.md").write_text(model_card(weights, repo, results, licence), encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """What `xar fid --json` printed, from a file.

    Raises:
        UserError: not JSON, or without protocols, metrics, reference or count: no number is reported without them.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        _table_rows(results)
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"Cannot read the results '{path}': {type(error).__name__} {error}.",
            "Give a file with the output of `xar fid --json`.",
        ) from None
    return results


def model_card(weights: WeightsFile, repo: str, results: Sequence[Mapping[str, Any]], licence: str | None) -> str:
    """The README.md of a repository on the hub: what the model is, how to use it, how good it is."""
    config = weights.config
    parameters = num_parameters(config) / 1e6
    source = f"hf://{repo}/{WEIGHTS_NAME}"
    tokenizer = " --tokenizer-weights kl16.ckpt" if config.tokenizer.kind == "kl16" else ""
    classes = f"{config.data.num_classes} classes" if config.data.num_classes else "no classes"
    one_class = " --class 0" if config.data.num_classes else ""
    taken = [f"{key} {value}" for key, value in (("epoch", weights.epoch), ("step", weights.step)) if value is not None]
    entity = ", ".join(str(value) for value in config.entity.model_dump().values())
    front = [
        "---",
        "library_name: xar",
        "tags: [xar, image-generation, autoregressive, flow-matching]",
        *([f"license: {licence}"] if licence else []),
        "---",
    ]
    ours = weights.step is not None  # our runs tell steps; the original's checkpoints epochs
    body = [
        f"# {repo.partition('/')[2]}",
        "",
        f"An xAR image generator (arXiv 2502.20388){', trained with `xar`' if ours else ''} on {config.data.dataset}: "
        f"{parameters:.1f} M parameters, {config.data.size_text}, "
        f"{classes}, recipe `{config.name}`, entity {entity}.",
        f"The weights are {_KINDS[weights.kind]}" + (f", taken at {', '.join(taken)}." if taken else "."),
        "",
        "## Use",
        "```",
        f"xar sample --weights {source}{tokenizer}{one_class} --count 16 --out samples",
        f"xar weights info {source}",
        "```",
        f"The recipe stands in `recipe.yaml` and inside `{WEIGHTS_NAME}`. "
        f"Its sampler: {config.sample.solver}, {config.sample.num_steps} steps, "
        f"guidance {config.sample.guidance_scale:g}.",
        "",
        "## Results",
        *_results_table(results),
    ]
    if ours and config.published is not None and config.published.fid is not None:
        body += [
            "",
            f"For comparison, the paper's own model of this recipe: FID {config.published.fid} "
            f"({config.published.source}). That is not a result of these weights.",
        ]
    return "\n".join([*front, *body]) + "\n"


_KINDS = {
    "ema": "the average over training (EMA)",
    "raw": "the raw ones, not averaged",
    "unstated": "as their file has them, which does not say whether they are an average over training",
}


def _results_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if not results:
        return ["Not measured yet."]
    head = ["| metric | value | protocol | images | reference |", "|---|---|---|---|---|"]
    return head + [row for result in results for row in _table_rows(result)]


def _table_rows(result: Mapping[str, Any]) -> list[str]:
    """One row a metric, of the JSON of `xar fid`: value and error, protocol, count, reference with its hash.

    A metric without a number (its value is null, or not finite) has no row.

    Raises:
        ValueError: the reference has no sha256.
    """
    sha256 = result["reference"]["sha256"]
    if not is_sha256(sha256):
        raise ValueError(f"the reference's sha256 is '{sha256}'")
    reference = f"{Path(result['reference']['name']).name} (sha256 {sha256[:12]})"
    count = int(result["samples"]["count"])
    rows = []
    for protocol, found in result["protocols"].items():
        for metric in found["metrics"].values():
            if metric["value"] is None or not math.isfinite(metric["value"]):
                continue
            error = f" ± {metric['error']:.2g}" if metric.get("error") else ""
            rows.append(f"| {metric['name']} | {metric['value']:.4g}{error} | {protocol} | {count} | {reference} |")
    return rows
