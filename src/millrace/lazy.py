"""Public names that are imported on first use, so that importing a package stays fast."""

import importlib
from collections.abc import Callable, Iterable, Mapping


def exports(
    package: str, modules: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the package's `__getattr__` and `__dir__`. `modules`: the public names of each module."""
    where = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> object:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(where[name]), name)

    def names() -> list[str]:
        return list(importlib.import_module(package).__all__)

    return get, names
