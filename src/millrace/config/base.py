"""The base class of all settings models."""

from typing import Any

from pydantic import BaseModel, ConfigDict

# The value of an engine's or a router's own argument. A dictionary becomes JSON.
ForeignArgument = str | int | float | bool | list[str | int] | dict[str, Any] | None


class Model(BaseModel):
    """Base class of all settings models. Instances are frozen, and an unknown key is an error.

    The docstring below a field is its description. `millrace config` prints it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)
