"""Find a recipe, merge `--set` overrides into it, validate it, write it down.

All faults of a recipe are reported at once, each with the nearest key that exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from xar_cli.config.schema import Config, Published
from xar_cli.errors import UserError, did_you_mean, nearest

YAML_TEXT, YAML_INT, YAML_FLOAT, YAML_TRUTH, YAML_DATE, YAML_MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "timestamp", "merge")
)
OF_A_TAG = (ValueError, KeyError, AttributeError)  # of PyYAML, for a value that its tag does not allow: `!!bool foo`
DECIMAL = re.compile(r"[-+]?[0-9_]+")
OPTIMISATION = (
    "epochs", "global_batch_size", "base_lr", "min_lr", "warmup_fraction", "decay_start_fraction", "betas",
    "weight_decay", "grad_clip", "ema_decays", "context", "label_dropout",
)  # fmt: skip


def recipes_folder() -> Path:
    """The folder of the shipped recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def list_recipes() -> dict[str, Path]:
    """Every shipped recipe by name (`base`, `ablations/cell-4`), in alphabetical order."""
    folder = recipes_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def load_recipe(name_or_file: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a shipped recipe, or of a YAML file of one's own, with overrides applied.

    Args:
        name_or_file: a name from `list_recipes`, or the path of a .yaml file.
        overrides: `section.key=value` texts, as given to `--set`; values are read as YAML.

    Raises:
        UserError: for an unknown recipe, unreadable YAML, or faults in the content (all of them at once).
    """
    shipped = list_recipes()
    if name_or_file in shipped:
        return load_config_file(shipped[name_or_file], overrides)
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        return load_config_file(path, overrides)
    raise UserError(f"There is no recipe called '{name_or_file}'.", did_you_mean(name_or_file, shipped))


def load_config_file(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with overrides applied; raises UserError as `load_recipe` does.

    A file may say `extends: NAME` and then holds only what differs from that shipped recipe.
    """
    values = _whole(path)
    _apply_overrides(values, overrides)
    return validate(values, str(path))


def published_result(config: Config) -> Published | None:
    """What the paper reports, if a config is still the shipped recipe that it reports it for.

    Images, network, entities and optimisation count; how a run is cut, logged, drawn and judged does not.
    """
    shipped = list_recipes().get(config.name)
    if shipped is None:
        return None
    original = load_config_file(shipped)
    return original.published if _what_is_trained(config) == _what_is_trained(original) else None


def _what_is_trained(config: Config) -> dict[str, Any]:
    """The settings that make a result what it is."""
    values = config.model_dump(include={"data", "tokenizer", "entity", "model", "train"})
    values["train"] = {key: values["train"][key] for key in OPTIMISATION}
    return values


def _whole(path: Path) -> dict[str, Any]:
    """The values of a recipe's file, laid over those of the recipe that it extends."""
    values = _read_yaml(path)
    if "extends" not in values:
        return values
    shipped, parent = list_recipes(), str(values.pop("extends"))
    if parent not in shipped:
        raise UserError(f"'{path}' extends '{parent}', which is no recipe.", did_you_mean(parent, shipped))
    return _merged(_whole(shipped[parent]), values)


class PlainValues(yaml.SafeLoader):
    """YAML's safe values without its surprises: numbers to the base 10 alone, every key of a mapping once.

    So 010 is ten, and 0x10, 40:15 (a schedule of steps, not 2415) and 2026-02-30 are text. So are true, on and yes: the
    schema takes them for what they say where it asks for it, and not for 1 where it asks for a number.
    """

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """The tag of a value."""
        tag: str = super().resolve(kind, value, implicit)
        other_base = (tag == YAML_INT and not DECIMAL.fullmatch(value)) or (tag == YAML_FLOAT and ":" in value)
        return YAML_TEXT if other_base or tag in (YAML_DATE, YAML_TRUTH) else tag

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """The whole number of a node, read to the base 10 also where it begins with 0."""
        return int(str(self.construct_scalar(node)).replace("_", ""))

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The node of a mapping.

        Raises:
            ComposerError: a key stands in it twice; `<<` may.
        """
        mapping: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == YAML_MERGE:
                continue
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"'{key.value}' stands there twice", key.start_mark)
            seen.add(key.value)
        return mapping


PlainValues.add_constructor(YAML_INT, PlainValues.construct_decimal)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), PlainValues)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read the recipe '{path}': {error}.", "Check the path, or see `xar recipes list`."
        ) from None
    except (yaml.YAMLError, *OF_A_TAG) as error:
        where = " ".join(str(error).split())
        raise UserError(f"The recipe '{path}' is not valid YAML: {where}.", "Mend the file at that place.") from None
    if not isinstance(values, dict):
        raise UserError(
            f"The recipe '{path}' is not a mapping of sections.", "See `xar recipes show tiny` for the form."
        )
    return values


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values with changes laid over them, section by section; a section of another `kind` is replaced whole."""
    merged = dict(values)
    for key, change in changes.items():
        there = merged.get(key)
        if isinstance(change, dict) and isinstance(there, dict) and not _is_another_kind(there, change.get("kind")):
            change = _merged(there, change)
        merged[key] = change
    return merged


def _is_another_kind(section: Mapping[str, Any], kind: Any) -> bool:
    """Whether a section is of another kind than what is said of it; where one of both states none, it is not."""
    return kind is not None and section.get("kind", kind) != kind


def validate(values: Mapping[str, Any], source: str) -> Config:
    """Check raw values against the schema; `source` names them in the error."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _faulty(source, [_describe(fault) for fault in error.errors()]) from None


def check_new_run(config: Config) -> None:
    """Raise a UserError where no run should begin with a config, though one that has begun may go on with it."""
    faults = config.faults_of_a_new_run()
    if faults:
        raise _faulty(f"The recipe {config.name}", faults)


def _faulty(source: str, faults: Sequence[str]) -> UserError:
    listed = "\n".join(f"  {fault}" for fault in faults)
    return UserError(
        f"{source} has {len(faults)} {'fault' if len(faults) == 1 else 'faults'}:\n{listed}\n",
        "Mend these keys; `xar recipes show tiny` prints a whole recipe.",
    )


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A config with `--set` overrides applied, validated again; raises UserError as `load_recipe` does."""
    values = config.model_dump(mode="json", exclude_none=True)
    _apply_overrides(values, overrides)
    return validate(values, config.name)


def dump_config(config: Config) -> str:
    """The resolved config as YAML; loading it gives an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Lay overrides over values; a kind comes before what is said of it."""
    for text in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith(".kind")):
        _apply_override(values, text)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"'--set {override}' is not of the form section.key=value.",
            "For example: --set train.epochs=400.",
        )
    if key == "extends":
        raise UserError(
            "A recipe extends another by what stands in its file, not by --set.",
            f"For example: --recipe {text or 'base'}.",
        )
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise UserError(
                f"'--set {override}': '{section}' holds a value, not a section.",
                "See `xar recipes show tiny`.",
            )
    try:
        value = yaml.load(text, PlainValues)
    except (yaml.YAMLError, *OF_A_TAG) as error:
        why = getattr(error, "problem", None) or error
        raise UserError(
            f"'--set {override}': '{text}' is not a YAML value: {why}.", "Mend it, or quote it for your shell."
        ) from None
    if last == "kind" and _is_another_kind(place, value):
        place.clear()
    place.update(_merged(place, {last: value}))


def _describe(fault: Mapping[str, Any]) -> str:
    """One fault of a recipe as a line: where, what, and the nearest known key for an unknown one."""
    location, kind = list(fault["loc"]), ""
    if len(location) > 1 and location[0] in ("tokenizer", "entity"):
        kind = str(location.pop(1))  # which pydantic names between the section and the key
    where = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        match = nearest(str(location[-1]), _known_keys(location[:-1], kind))
        unknown = "unknown key" + (f" for kind {kind}" if kind else "")
        return f"{where}: {unknown}" + (f"; did you mean '{match}'?" if match else "")
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("missing", "value_error"):
        return f"{where}: {message}" if where else message
    return f"{where}: {message} (got {fault['input']!r})"


def _known_keys(path: Sequence[Any], kind: str) -> list[str]:
    """The keys that the schema knows at a place, of this kind where there are several, for suggestions."""
    schema = Config.model_json_schema()
    nodes = [schema]
    for part in path:
        found = []
        for node in nodes:
            child = node.get("properties", {}).get(str(part), {})
            if kind:
                child = {"$ref": child["discriminator"]["mapping"][kind]}
            for option in [child, *child.get("anyOf", []), *child.get("oneOf", [])]:
                if "$ref" in option:
                    found.append(schema["$defs"][option["$ref"].rsplit("/", 1)[1]])
        nodes = found
    of_the_file = [] if path else ["extends"]
    return of_the_file + [key for node in nodes for key in node.get("properties", {})]
