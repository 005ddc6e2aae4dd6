"""The text that `millrace config` prints, made from the JSON schema of the settings models."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from millrace.config.base import Model
from millrace.config.explain import nearest
from millrace.config.models import RunConfig
from millrace.errors import ConfigError

WIDTH = 100
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}

Schema = Mapping[str, Any]


def describe(name: str = "", kind: type[Model] = RunConfig) -> str:
    """Return a description of the settings of a config: their types, defaults and meanings.

    `name` selects one section (`rollout`, or `engine.sglang` for one kind) or one setting (`train.lr`). All settings
    are described if it is empty. Raises ConfigError if no section or setting has this name.
    """
    schema = kind.model_json_schema()
    entries = list(_entries(schema, schema["$defs"]))
    found = [text for names, text in entries if not name or any(f"{one}.".startswith(f"{name}.") for one in names)]
    if not found:
        known = sorted({one for names, _ in entries for one in names})
        sections = sorted({names[1].rpartition(".")[0] for names, _ in entries} - {""})
        hint = nearest(name, known) or f"the sections are {', '.join(sections)}"
        raise ConfigError(f"there is no section or setting {name}; {hint}")
    return "\n".join(found)


def _entries(
    section: Schema, definitions: Schema, at: str = "", within: str = "", kind: str = ""
) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the names and the text of every section and setting. A section comes before its contents.

    The first name is the one in a config (`engine.tp_size`). The second also has the kinds (`engine.sglang.tp_size`).
    at, within: these two names of `section`. kind: its kind.
    """
    required = section.get("required", ())
    for key, field in section["properties"].items():
        place, named = (f"{above}.{key}" if above else key for above in (at, within))
        choices = [definitions[reference.rpartition("/")[2]] for reference in _references(field)]
        if not choices:
            yield (place, named), _entry(place, field, key in required, kind if key != "kind" else "")
            continue
        of = f" (kind: {kind})" if kind else ""
        default = ("required" if key in required else "optional") + of
        # The schema omits a description that is equal to the model's own.
        meaning = field.get("description", choices[0].get("description", ""))
        what = "a section" if _is_section(field) else "a section or a list of sections"
        if plain := [part for part in _parts(field)[1:] if part.get("type") not in (None, "array", "null")]:
            what, default = f"{_type(plain[0])} or a section", f"default {_default(field)}{of}"
        yield (place, named), _paragraph(f"{place}: {what}, {default}", meaning)
        for inner in choices:
            inner_kind = inner["properties"].get("kind", {}).get("const", "")
            inner_named = f"{named}.{inner_kind}" if inner_kind else named
            if inner_kind:
                head = f"{place} with kind: {inner_kind}"
                yield (inner_named, inner_named), _paragraph(head, inner.get("description", ""))
            yield from _entries(inner, definitions, place, inner_named, inner_kind or kind)


def _references(field: Schema) -> list[str]:
    """Return the schema's references to the models that a field, or a list in it, may hold."""
    parts = _parts(field)
    parts += [part["items"] for part in parts if isinstance(part.get("items"), dict)]
    return [part["$ref"] for part in parts if "$ref" in part]


def _is_section(field: Schema) -> bool:
    return any("$ref" in part for part in _parts(field))


def _parts(field: Schema) -> list[Schema]:
    parts = [field, *field.get("anyOf", ()), *field.get("oneOf", ())]
    return parts + [inner for part in parts[1:] for inner in part.get("oneOf", ())]


def _entry(place: str, field: Schema, required: bool, kind: str) -> str:
    default = "required" if required else f"default {_default(field)}"
    of = f" (kind: {kind})" if kind else ""
    return _paragraph(f"{place}: {_type(field)}, {default}{of}", field.get("description", ""))


def _default(field: Schema) -> str:
    if "default" not in field:
        return "empty"
    return orjson.dumps(field["default"]).decode()


def _type(field: Schema) -> str:
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(choice) for choice in field["anyOf"]))
    bounds = "".join(f" {words} {field[bound]:g}" for bound, words in BOUNDS.items() if bound in field)
    match field.get("type"):
        case "integer":
            return f"whole number{bounds}"
        case "number":
            return f"number{bounds}"
        case "boolean":
            return "true or false"
        case "string":
            return "path" if field.get("format") == "path" else "text"
        case "array" if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}: {_type(field['prefixItems'][0])}"
        case "array":
            return f"list of {_type(field['items'])}"
        case "object":
            return "mapping"
        case kind:
            return str(kind)


def _paragraph(head: str, description: str) -> str:
    text = " ".join(description.split())
    return "\n".join([head, *textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")])
