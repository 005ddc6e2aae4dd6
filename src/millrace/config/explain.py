"""One line of text for each of pydantic's errors: the setting, the reason, and the nearest valid name."""

import difflib
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from millrace.config.reading import Location


def explain(error: Any, root: Any, at: Location = ()) -> tuple[Location, str]:
    """Return the location of one of pydantic's errors, and its message.

    root: the model, or the union of models, that was validated. at: the location of what was validated.
    """
    location, model = resolve(error["loc"], root)
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_kind(error, location, model, root, at)
    location = (*at, *location)
    name = _dotted(location)
    if error["type"] == "extra_forbidden":
        valid = list(model.model_fields) if model else []
        hint = nearest(str(location[-1]), valid) or f"valid here: {', '.join(valid)}"
        return location, f"unknown setting {name}; {hint}"
    if error["type"] == "missing":
        return location, f"the setting {name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":
        message = "it must be a section with settings of its own"
    if not location:
        return location, message
    given = "" if isinstance(error["input"], dict) else f" (it is {error['input']!r})"
    quote = "; put it in quotes" if is_unquoted(error) else ""
    return location, f"{name}: {message}{given}{quote}"


def is_unquoted(error: Any) -> bool:
    """Whether the setting is a string, and YAML read a number, a date or a boolean."""
    return error["type"] in ("string_type", "path_type") and not isinstance(error["input"], list | dict | None)


def nearest(name: str, valid: Sequence[str]) -> str:
    """Return a hint with the valid name that is nearest to `name` in any case; an empty string if none is near."""
    by_lower = {one.lower(): one for one in valid}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"did you mean {by_lower[found[0]]!r}?" if found else ""


def resolve(loc: Location, root: Any) -> tuple[Location, type[BaseModel] | None]:
    """Return pydantic's location without the tags of discriminated unions, and the model that has its last part."""
    model: type[BaseModel] | None = None
    cleaned: list[str | int] = []
    choices = models_in(root)
    for index, part in enumerate(loc):
        if str(part).startswith("<"):  # the tag of a value that may have several types
            continue
        if len(choices) > 1:
            model = next((m for m in choices if part in _kinds(m)), None)
            choices = []
            if model is not None:
                continue
        elif choices:
            [model] = choices
        cleaned.append(part)
        if index < len(loc) - 1:
            field = model.model_fields.get(str(part)) if model else None
            choices = models_in(field.annotation) if field else []
    return tuple(cleaned), model


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings models in an annotation."""
    if get_origin(annotation) is Annotated:
        return models_in(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return [m for choice in get_args(annotation) for m in models_in(choice)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _explain_kind(
    error: Any, location: Location, model: type[BaseModel] | None, root: Any, at: Location
) -> tuple[Location, str]:
    """Explain the error of a section whose `kind` is wrong or missing. The kind decides which settings are valid."""
    field = model.model_fields.get(str(location[-1])) if model and location else None
    annotation = field.annotation if field else root
    kinds = [str(kind) for m in models_in(annotation) for kind in _kinds(m)]
    location = (*at, *location, "kind")
    name, valid = _dotted(location), f"valid kinds: {', '.join(kinds)}"
    if error["type"] == "union_tag_not_found":
        return location, f"the setting {name} is missing; {valid}"
    given = str(error["ctx"]["tag"])
    hint = nearest(given, kinds)
    return location, f"{name}: there is no kind {given!r}; {valid}{f'; {hint}' if hint else ''}"


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation)
