"""manifest.json of a folder of samples: what was asked for, so that the same images can be made again or completed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from xar_cli.config.schema import height_and_width
from xar_cli.errors import UserError
from xar_cli.run_dir import require_writable
from xar_cli.sample.images import TEMPORARY, image_path, is_whole, remove_temporaries
from xar_cli.sample.noise import balanced_label
from xar_cli.sample.packing import pack_bytes, pack_is_current, pack_path
from xar_cli.sample.plan import SamplingPlan
from xar_cli.sample.settings import Pack, SampleSettings

MANIFEST = "manifest.json"
MANIFEST_FORMAT = {"format": "xar-samples", "version": 1}
FREE_KEYS = (  # may differ where a folder is completed, or follow from others
    "count", "labels", "weights", "config", "class_names", "evaluations",
)  # fmt: skip
LATER_KEYS = ("tokenizer", "latent_scale", "entity", "decoder_precision")  # manifests of version 0.1.0 lack them
PNG_OVERHEAD = 4096  # bytes beside the pixels: header and the file system's block


def make_manifest(settings: SampleSettings, weights_sha256: str, tokenizer: str) -> dict[str, Any]:
    """Everything that is needed to make the same images again.

    Args:
        settings: what was asked for.
        weights_sha256: of the network's weights.
        tokenizer: identity of the tokenizer.
    """
    config, plan = settings.config, SamplingPlan.of(settings.config)
    passes = plan.evaluations()
    resolved = config.model_dump(mode="json")
    uniform = len(set(plan.num_steps)) == 1
    decodes = config.tokenizer.kind == "kl16"  # pixels are folded, which has no precision
    return {
        **MANIFEST_FORMAT,
        "recipe": config.name,
        "weights": settings.weights,
        "weights_sha256": weights_sha256,
        "ema": settings.ema,
        "tokenizer": tokenizer,
        "latent_scale": config.tokenizer.latent_scale,
        **({"decoder_precision": config.sample.decoder_precision} if decodes else {}),
        "entity": resolved["entity"],
        "seed": settings.seed,
        "solver": plan.solver,
        "num_steps": plan.num_steps[0] if uniform else list(plan.num_steps),
        "guidance_scale": config.sample.guidance_scale,
        "guidance_schedule": config.sample.guidance_schedule,
        "guidance_interval": list(plan.interval),
        "evaluations": {"entities": len(plan.num_steps), **asdict(passes), "total_per_image": passes.total},
        "precision": config.train.precision,
        "image_size": resolved["data"]["image_size"],
        "image_channels": config.data.image_channels,
        "count": settings.count,
        "class_names": list(settings.class_names),
        "labels": [balanced_label(settings.seed, index, settings.classes) for index in range(settings.count)],
        "config": resolved,
    }


def check_out(out: Path, manifest: Mapping[str, Any], packs: Sequence[str] = ()) -> list[int]:
    """Refuse a folder that cannot take these images, and clear away what a kill has left; nothing is written.

    Args:
        out: the folder; it need not exist.
        manifest: what the images are to be.
        packs: files to be made of them.

    Returns:
        The numbers of the images that are missing.

    Raises:
        UserError: the folder holds images made with other settings (the differences are named) or other files, or its
            disk is too small for what is missing.
    """
    path = out / MANIFEST
    if path.exists():
        found = differences(_read(path), manifest)
        if found:
            raise UserError(
                f"'{out}' holds images made with other settings: {'; '.join(found)}.",
                "Give another --out, or the same settings to make what is missing.",
            )
    elif out.exists() and not (out.is_dir() and all(TEMPORARY.fullmatch(entry.name) for entry in out.iterdir())):
        raise UserError(f"'{out}' is not empty and has no {MANIFEST}.", "Give another --out.")
    if out.exists():
        remove_temporaries(out)
    missing = [index for index in range(manifest["count"]) if not is_whole(image_path(out, index))]
    height, width = height_and_width(manifest["image_size"])
    needed = len(missing) * (height * width * manifest["image_channels"] + PNG_OVERHEAD)
    needed += sum(pack_bytes(manifest, pack) for pack in packs_to_write(out, manifest, packs, bool(missing)))
    require_writable(out, needed, "images")
    return missing


def forget_if_empty(out: Path) -> None:
    """Take the manifest away from a folder without any image, for its job has failed: it may be made otherwise."""
    if not any(out.glob("*.png")) and not any(pack_path(out, pack).exists() for pack in get_args(Pack)):
        (out / MANIFEST).unlink(missing_ok=True)


def packs_to_write(out: Path, manifest: Mapping[str, Any], packs: Sequence[str], fresh: bool) -> list[str]:
    """The packed files that must be made: all where images are `fresh`, else those that do not fit the manifest."""
    return [pack for pack in packs if fresh or not pack_is_current(out, manifest, pack)]


def count_there(out: Path) -> int:
    """How many images the folder was last asked to hold; 0 for one without a manifest.

    Raises:
        UserError: its manifest is damaged.
    """
    path = out / MANIFEST
    return int(_read(path)["count"]) if path.exists() else 0


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What keeps images of two manifests from lying in one folder; more images than before are no difference."""
    found = [
        f"{key}: {there.get(key)} there, {value} here"
        for key, value in here.items()
        if key not in FREE_KEYS and there.get(key) != value and not (key in LATER_KEYS and key not in there)
    ]
    common = min(len(there["labels"]), here["count"])
    if there["labels"][:common] != here["labels"][:common] and not found:
        found.append("other classes")
    if here["count"] < there["count"]:
        found.append(f"count: {there['count']} there, {here['count']} here")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if not isinstance(found, dict) or not (
        isinstance(found.get("labels"), list) and isinstance(found.get("count"), int)
    ):
        raise UserError(f"'{path}' is damaged or not a manifest of samples.", "Give another --out.")
    return found
