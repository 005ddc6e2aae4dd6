"""The virtual environments of engines, one for each engine, version and device.

The engines' dependencies conflict with each other and with Millrace's, so Millrace never imports an engine into its own
process. An environment is a folder in `environments_home()`, such as `sglang-0.5.23-cpu`. Beside it are the log of its
installation and its lock file.
"""

from millrace.engines.environments.install import install
from millrace.engines.environments.recipes import DEFAULT_VERSIONS, RECIPES, Recipe
from millrace.engines.environments.store import (
    Environment,
    Installed,
    environments_home,
    find,
    installed,
    remove,
    size,
)

__all__ = [
    "DEFAULT_VERSIONS",
    "RECIPES",
    "Environment",
    "Installed",
    "Recipe",
    "environments_home",
    "find",
    "install",
    "installed",
    "remove",
    "size",
]
