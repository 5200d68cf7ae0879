"""Every key of a recipe with its type, default and meaning: Markdown for people, JSON Schema for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from xar_cli.config.schema import Config

HEADER = """# Config reference

Every key of a recipe. Made from the schema by `xar recipes schema --markdown`; change the schema, not this page.
`--set section.key=value` overrides one key on the command line; an unknown key is an error.
A file with `extends: base` holds only what differs from that recipe. Nothing is required then, and a section of the
same kind keeps the keys that it does not name.
"""
EXTENDS = {"type": "string", "description": "Name of a shipped recipe that this one is but for what it says."}


def config_reference() -> str:
    """The whole page."""
    schema = Config.model_json_schema()
    return HEADER + "".join(_sections(schema))


def json_schema() -> str:
    """The JSON Schema of a recipe's file, for editors that complete YAML.

    A file that stands alone must hold the required keys; one that extends a recipe may leave out any.
    """
    schema = Config.model_json_schema()
    alone = {"required": schema.pop("required"), "properties": _required_in_sections(schema)}
    for section in schema["$defs"].values():
        section.pop("required", None)
    for field in schema["properties"].values():
        if "oneOf" in field:  # a section that does not state its kind may be of several
            field["anyOf"] = field.pop("oneOf")
            del field["discriminator"]
    schema["properties"] = {"extends": EXTENDS, **schema["properties"]}
    return json.dumps({**schema, "if": {"not": {"required": ["extends"]}}, "then": alone}, indent=2)


def _required_in_sections(schema: Mapping[str, Any]) -> dict[str, Any]:
    """For each section a schema that asks for its required keys, those of its kind where there are several."""
    asked = {}
    for name, field in schema["properties"].items():
        sections = [schema["$defs"][reference] for reference in _references(field)]
        options = [
            {
                "properties": {key: value for key, value in section["properties"].items() if key == "kind"},
                "required": section["required"],
            }
            for section in sections
        ]
        if options:
            asked[name] = {"anyOf": options}
    return asked


def _sections(schema: Mapping[str, Any]) -> Iterator[str]:
    definitions = schema["$defs"]
    plain = {name: field for name, field in schema["properties"].items() if not _references(field)}
    yield _table("(top level)", "", {"extends": EXTENDS, **plain}, schema.get("required", ()))
    for name, field in schema["properties"].items():
        for reference in _references(field):
            section = definitions[reference]
            kind = section["properties"].get("kind", {}).get("const")
            title = f"{name} (kind: {kind})" if kind else name
            yield _table(title, section.get("description", ""), section["properties"], section.get("required", ()))


def _table(title: str, text: str, fields: Mapping[str, Any], required: Any) -> str:
    rows = [
        f"| `{name}` | {_type(field)} | {_default(name, field, required)} | {field.get('description', '')} |"
        for name, field in fields.items()
    ]
    heading = f"\n## {title}\n\n" + (" ".join(text.split()) + "\n\n" if text else "")
    return heading + "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _references(field: Mapping[str, Any]) -> list[str]:
    """Names of the sections that a key of the top level may hold."""
    options = [field, *field.get("anyOf", []), *field.get("oneOf", [])]
    return [option["$ref"].rsplit("/", 1)[1] for option in options if "$ref" in option]


def _type(field: Mapping[str, Any]) -> str:
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"] if option.get("type") != "null")
    if "prefixItems" in field:
        return f"[{', '.join(_type(item) for item in field['prefixItems'])}]"
    if field.get("type") == "array":
        inner = _type(field.get("items") or {})
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    return str(field.get("type", "any"))


def _default(name: str, field: Mapping[str, Any], required: Any) -> str:
    if name in required:
        return "required"
    value = field.get("default")
    return "none" if value is None else f"`{value}`" if value != "" else "empty"
