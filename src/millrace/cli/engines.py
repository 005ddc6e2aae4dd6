"""`millrace engines`: manages the virtual environments that engines run in, and joins engines over several hosts."""

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from millrace.cli.paths import existing_folder, expanded, path
from millrace.cli.settings import load_settings
from millrace.cli.status import interruptible
from millrace.config.engines import EmbeddedEngineConfig
from millrace.engines import environments
from millrace.engines.join import join as run_node
from millrace.errors import ConfigError

engines_app = typer.Typer(
    no_args_is_help=True, help="Install, list and remove the virtual environments that engines run in."
)

EngineArgument = Annotated[str, typer.Argument(help="sglang, vllm, sglang-router or vllm-router.", show_default=False)]
VersionOption = Annotated[
    str | None,
    typer.Option("--version", help="Its version. The default is the newest tested version.", show_default=False),
]
CpuOption = Annotated[bool, typer.Option("--cpu", help="The build that runs without a GPU.")]


@engines_app.command()
def install(
    engine: EngineArgument,
    version: VersionOption = None,
    cpu: CpuOption = False,
    python: Annotated[
        str,
        typer.Option(parser=expanded, metavar="TEXT", help="The Python interpreter that makes the environment."),
    ] = sys.executable,
) -> None:
    """Make an engine's environment unless it exists. Run the command again after an interruption."""
    begun = time.monotonic()
    with (
        interruptible(lambda: "the installation has been ended; the same command starts it again"),
        _progress() as show,
    ):
        made = environments.install(
            engine, version or _default_version(engine), _device(engine, cpu), python=python, progress=show
        )
    print(f"{made} is ready in {made.path} ({time.monotonic() - begun:.1f} s)")


@engines_app.command(name="list")
def list_environments() -> None:
    """List the environments, including unfinished ones."""
    found = environments.installed()
    if not found:
        print(f"no environment in {environments.environments_home()}; make one with: millrace engines install sglang")
        return
    table = Table("engine", "version", "device", "size", "state", "path")
    for one in found:
        env = one.environment
        gigabytes = environments.size(env) / 1e9
        state = "complete" if one.whole else "unfinished"
        table.add_row(env.engine, env.version, env.device, f"{gigabytes:.1f} GB", state, str(env.path))
    console = Console()
    if not console.is_terminal:  # a pipe has no width to fold the paths into
        console.width = 80 + max(len(str(one.environment.path)) for one in found)
    console.print(table)


@engines_app.command()
def remove(engine: EngineArgument, version: VersionOption = None, cpu: CpuOption = False) -> None:
    """Delete an engine's environment, finished or not."""
    version = version or _default_version(engine)
    environments.remove(engine, version, _device(engine, cpu))
    print(f"removed {engine} {version} ({_device(engine, cpu)})")


@engines_app.command()
def join(
    config: Annotated[
        Path,
        typer.Argument(parser=path, help="The run's settings (YAML), the same on all hosts.", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides of the settings, at least engine.node_rank=1 (or 2, ...).", show_default=False),
    ] = None,
    model: Annotated[
        Path,
        typer.Option(
            parser=existing_folder, metavar="FOLDER", help="Folder of the model on this host.", show_default=False
        ),
    ] = ...,  # type: ignore[assignment] # required
) -> None:
    """Run this host's node of an engine over several hosts, until the engine ends."""
    run = load_settings(config, overrides or ())
    settings = run.engine
    if isinstance(settings, EmbeddedEngineConfig):
        raise ConfigError(f"engine.kind {settings.kind} does not run over several hosts")
    with interruptible(lambda: "this host's node has been ended"):
        asyncio.run(
            run_node(
                settings,
                model,
                log_dir=Path("logs"),
                seed=run.seed,
                ready=lambda: print("joined", flush=True),
            )
        )


def _device(engine: str, cpu: bool) -> str:
    """Return the device of an environment. Routers always run on the CPU."""
    return "cpu" if cpu or engine.endswith("-router") else "cuda"


def _default_version(engine: str) -> str:
    if engine not in environments.DEFAULT_VERSIONS:
        raise ConfigError(f"there is no engine {engine}; valid engines: {', '.join(environments.DEFAULT_VERSIONS)}")
    return environments.DEFAULT_VERSIONS[engine]


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress: a bar on a terminal, otherwise one line for each task and for each tenth of it."""
    console = Console()
    if not console.is_terminal:
        yield _Lines().show
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(SpinnerColumn(), *columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield show


class _Lines:
    """Progress as lines of text, for an output that is not a terminal."""

    def __init__(self) -> None:
        self._last: str | int = ""

    def show(self, what: str, done: int, total: int) -> None:
        this = 10 * done // total if total else what
        if this != self._last:
            print(f"{what} ({done} of {total})" if total else what, flush=True)
        self._last = this
