"""A fleet's view as a table for a terminal. Pure functions."""

import time
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from millrace.fleet.autoscaler import FleetSize
from millrace.fleet.event_file import Value
from millrace.fleet.event_log import Entry
from millrace.fleet.replica_state import Phase
from millrace.serve.view import EngineView, FleetView

NUMBERS = ("version", "lag", "run", "wait", "tok/s", "KV", "cached", "restarts")  # the table fits 80 columns
STYLES = {Phase.READY: "green", Phase.SUSPECT: "yellow", Phase.QUARANTINED: "red", Phase.DEAD: "red"}
BAD_EVENTS = ("_failed", "retry")  # the ends of their kinds


def fleet_table(view: FleetView, *, events: int, trouble: str | None = None) -> RenderableType:
    """Return a table with a row for each engine, and below it the last `events` events.

    trouble: why the view is out of date.
    """
    parts: list[RenderableType] = []
    if view.engines:
        parts = [_engines(view.engines), *(_remark(e) for e in view.engines if e.reason or e.silence)]
    elif view.size is None:
        parts = [Text("the engines are being started")]
    if (size := view.size) is not None and (not view.engines or size.wanted != size.serving or view.waiting):
        asleep = sum(bool(engine.asleep) for engine in view.engines)
        parts.append(Text(_size(size, asleep, view.waiting)))
    if latest := view.events[-events:] if events else ():
        parts += [Text(), *(_event(entry) for entry in latest)]
    if trouble is not None:
        parts.append(Text(trouble, style="bold red"))
    return Group(*parts)


def _size(size: FleetSize, asleep: int, waiting: int) -> str:
    """Return the numbers of engines and of waiting requests in words."""
    engines = f"{size.serving} of {size.wanted} engine{'' if size.wanted == 1 else 's'} serving"
    if asleep:
        engines += f", {asleep} asleep"
    return f"{engines}, {size.starting} starting; {waiting} request{'' if waiting == 1 else 's'} waiting"


def _engines(engines: Sequence[EngineView]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("engine", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in NUMBERS:
        table.add_column(name, justify="right")
    for engine in engines:
        state = f"{engine.state}, asleep" if engine.asleep else engine.state.value
        table.add_row(Text(engine.name), Text(state, style=STYLES.get(engine.state, "cyan")), *_numbers(engine))
    return table


def _numbers(engine: EngineView) -> list[str]:
    """Return the cells of an engine's row. Unknown values are empty, not 0."""
    load = engine.load
    work = ["", "", "", ""]
    if load is not None:
        # Some engines keep their last value while they are idle.
        speed = load.tokens_per_second if load.running_requests else 0.0
        full = f"{load.used_tokens / load.max_tokens:.0%}" if load.max_tokens else ""
        work = [str(load.running_requests), str(load.waiting_requests), f"{speed:,.0f}", full]
    share = "" if engine.cache_hit_share is None else f"{engine.cache_hit_share:.0%}"
    version = _known(engine.version) if engine.label is None else f"{engine.version} ({engine.label})"
    return [version, _known(engine.lag), *work, share, str(engine.restarts)]


def _known(number: int | None) -> str:
    return "" if number is None else str(number)


def _remark(engine: EngineView) -> Text:
    why = engine.reason or f"it does not report its load: {engine.silence}"
    return Text(f"{engine.name}: {why}", style=STYLES.get(engine.state, "cyan") if engine.reason else "yellow")


def _event(entry: Entry) -> Text:
    at = time.strftime("%H:%M:%S", time.localtime(entry.at))
    text = Text.assemble((at, "dim"), " ", entry.engine or "fleet", " ", entry.kind)
    for name, value in entry.fields.items():
        if value is not None:
            text.append(f" {name}=", style="dim").append(_short(value))
    if entry.kind.endswith(BAD_EVENTS) or entry.fields.get("state") in (Phase.DEAD, Phase.QUARANTINED):
        text.stylize("red")
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _short(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).partition("\n")[0]
