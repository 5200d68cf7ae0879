"""The config reference: every key of a recipe with its type, default and meaning, as Markdown, from the schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xar_cli.config.schema import Config

HEADER = """# Config reference

Every key of a recipe. Made from the schema by `xar recipes schema --markdown`; change the schema, not this page.
`--set section.key=value` overrides one key on the command line; an unknown key is an error.
"""


def config_reference() -> str:
    """The whole page."""
    schema = Config.model_json_schema()
    return HEADER + "".join(_sections(schema))


def _sections(schema: Mapping[str, Any]) -> Iterator[str]:
    definitions = schema["$defs"]
    plain = {name: field for name, field in schema["properties"].items() if not _references(field)}
    yield _table("(top level)", "", plain, schema.get("required", ()))
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
