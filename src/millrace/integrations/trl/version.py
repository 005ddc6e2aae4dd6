"""The versions of TRL that these adapters were tested with. They replace objects that TRL does not document."""

from importlib.metadata import version

from millrace.errors import ConfigError
from millrace.imports import require_modules

TESTED = "1.16"


def require_trl() -> None:
    """Raise ConfigError if TRL is not installed, or is not one of the tested versions. Imports nothing of it."""
    require_modules("millrace.integrations.trl", "trl", "accelerate")
    if (found := version("trl")).split(".")[:2] != TESTED.split("."):
        raise ConfigError(
            f"TRL {found} is installed. millrace.integrations.trl replaces undocumented objects of TRL, and was tested "
            f"with {TESTED} only; run: pip install 'trl=={TESTED}.*'"
        )
