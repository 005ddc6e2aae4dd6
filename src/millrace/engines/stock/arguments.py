"""Build the command lines of stock engines, and refuse contradicting settings. No I/O.

Some options have a Millrace setting. All others pass through `engine.engine_args` unchanged. An option that is set in
both places is an error, and the error names both.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from millrace.config.engines import EngineArgument, StockEngineConfig
from millrace.errors import ConfigError

# What sets an option, and what the user should do if `engine_args` sets it too.
Owner = tuple[str, str]
KV_EVENTS: Owner = ("engine.kv_events", "keep one of them: only one reader can use the events")
KEYS: Owner = ("the key that Millrace makes for each launch", "leave it out")
# The keys are passed in the server's environment, so that process lists do not show them.
API_KEY, ADMIN_KEY = "MILLRACE_API_KEY", "MILLRACE_ADMIN_API_KEY"


@dataclass(frozen=True, slots=True)
class Node:
    """The process of one node. Its environment holds secrets and is left out of the repr."""

    rank: int
    url: str | None  # where it answers health probes; None if it has no HTTP
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)


def device_names(visible: str) -> list[str]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES names, as indices or UUIDs."""
    return [name.strip() for name in visible.split(",") if name.strip()]


def local_ranks(config: StockEngineConfig) -> tuple[int, ...]:
    """Return the ranks of the nodes that run on this host."""
    return tuple(range(config.nnodes)) if config.node_rank is None else (config.node_rank,)


def given(config: StockEngineConfig) -> dict[str, EngineArgument]:
    """Return `engine_args`, keyed by option string."""
    return {option(name): value for name, value in config.engine_args.items()}


def option(name: str) -> str:
    """Return the option string of a name.

    `attention_backend`, `attention-backend` and `--attention-backend` are one option. The part after a dot is a key in
    the option's JSON value and stays unchanged.
    """
    name, dot, inner = name.removeprefix("--").partition(".")
    return f"--{name.replace('_', '-')}{dot}{inner}"


def options(values: Mapping[str, EngineArgument], *, off: bool = False) -> list[str]:
    """Return the command line for `values`.

    True becomes a bare flag. None is left out, which keeps the engine's default. False is left out too, or becomes
    `--no-...` if `off` is set. A list becomes several values, and a dictionary becomes JSON.
    """
    line: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        if value is True:
            line.append(option(name))
        elif value is False:
            line += [option(f"no_{name.removeprefix('--')}")] if off else []
        elif isinstance(value, list):
            line += [option(name), *map(str, value)]
        else:  # one word, so that a value can begin with a dash
            line.append(f"{option(name)}={json.dumps(value) if isinstance(value, dict) else value}")
    return line


def kv_events_config(endpoint: str | None, **further: bool) -> EngineArgument:
    """Return the value of `--kv-events-config`, which both engines have."""
    return None if endpoint is None else {"publisher": "zmq", "endpoint": endpoint, **further}


def require_set_once(
    config: StockEngineConfig,
    *,
    settings: Mapping[str, str],
    others: Mapping[str, Owner],
    environment: Mapping[str, Owner],
) -> None:
    """Raise ConfigError for an engine argument or environment variable that Millrace sets itself.

    settings: option string to the `engine.` setting that sets it. others: option string to its owner, for options that
    are set elsewhere or must not be set. environment: the same for environment variables.
    """
    owners = {name: (f"engine.{setting}", f"set only engine.{setting}") for name, setting in settings.items()}
    owners |= others
    if config.kv_events:
        owners |= {"--kv-events-config": KV_EVENTS}
    seen: dict[str, str] = {}
    for name in config.engine_args:
        whole = option(name)
        if whole in seen:
            raise ConfigError(f"engine.engine_args.{name} and engine.engine_args.{seen[whole]} are the same argument")
        seen[whole] = name
        prefix = whole.partition(".")[0]
        # The engines' parsers accept any unique prefix of an option, so --tens means --tensor-parallel-size.
        for known, (owner, advice) in owners.items():
            if prefix == known or (known.startswith(prefix) and prefix not in owners):
                raise ConfigError(f"engine.engine_args.{name} contradicts {owner}; {advice}")
    for name in config.env:
        if name in environment:
            owner, advice = environment[name]
            raise ConfigError(f"engine.env.{name} contradicts {owner}; {advice}")
