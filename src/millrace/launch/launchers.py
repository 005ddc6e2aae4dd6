"""The launchers by their names in `engine.launch`."""

import importlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from millrace.errors import ConfigError
from millrace.launch.base import Launcher
from millrace.launch.local import LOCAL
from millrace.launch.ray_cluster.launcher import open_ray
from millrace.launch.slurm.launcher import open_slurm


@asynccontextmanager
async def open_launcher(name: str, cluster: str | None) -> AsyncIterator[Launcher]:
    """Yield the launcher of this name: `local`, `ray`, `slurm`, or `module:attribute`.

    An attribute is a function that takes `cluster` and returns an async context manager of a `Launcher`. cluster: the
    address of the cluster, for launchers that have one.

    Raises ConfigError if there is no such launcher, and what it raises when it opens.
    """
    if name == "local":
        yield LOCAL
        return
    if (opened := {"ray": open_ray, "slurm": open_slurm}.get(name)) is not None:
        async with opened(cluster) as on_cluster:
            yield on_cluster
        return
    async with _own(name)(cluster) as launcher:
        yield launcher


def _own(name: str) -> Callable[[str | None], AbstractAsyncContextManager[Launcher]]:
    module, _, attribute = name.partition(":")
    try:
        found: Callable[[str | None], AbstractAsyncContextManager[Launcher]] = getattr(
            importlib.import_module(module), attribute
        )
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"engine.launch: {name} can't be imported: {error}") from error
    return found
