"""The virtual environments that engines run in: outside the project's own, one for each engine, version and device.

Their pins contradict each other and ours, so nothing of an engine is ever imported into Millrace's own process. An
environment is a folder below `environments_home()`, such as `sglang-0.5.23-cpu`; beside it lie the log of its
installation and the file that is locked while one process works on it.
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
