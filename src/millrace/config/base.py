"""What all settings have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict

# An argument of an engine or a router, by its own name. A dictionary becomes JSON.
ForeignArgument = str | int | float | bool | list[str | int] | dict[str, Any] | None


class Model(BaseModel):
    """The base of all settings: frozen, and strict about keys. The docstring below a field is its description, which
    `millrace config` prints."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)
