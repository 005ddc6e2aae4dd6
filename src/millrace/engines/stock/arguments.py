"""What the stock engines' command lines have in common: a setting as an option, and who may say it. No I/O.

Millrace sets what it has a setting for; everything else reaches the engine through `engine.engine_args` as it is given.
Whoever says one thing in both places gets an error that names both.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from millrace.config.models import EngineArgument, StockEngineConfig
from millrace.errors import ConfigError

# Who sets something, and what to do about saying it again.
Owner = tuple[str, str]
KV_EVENTS: Owner = ("engine.kv_events", "keep one of them: what Millrace reads, nobody else does")
KEYS: Owner = ("the key that Millrace makes for each launch", "leave it out")
# The keys stand in the server's environment, where no list of processes shows them.
API_KEY, ADMIN_KEY = "MILLRACE_API_KEY", "MILLRACE_ADMIN_API_KEY"


@dataclass(frozen=True, slots=True)
class Node:
    """How to start one node's process. Its environment has secrets and so is not shown."""

    rank: int
    url: str | None  # where it answers health probes; None where it has no HTTP
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)


def local_ranks(config: StockEngineConfig) -> tuple[int, ...]:
    """The ranks of the nodes that are this host."""
    return tuple(range(config.nnodes)) if config.node_rank is None else (config.node_rank,)


def given(config: StockEngineConfig) -> dict[str, EngineArgument]:
    """`engine_args` by the names of the options."""
    return {option(name): value for name, value in config.engine_args.items()}


def option(name: str) -> str:
    """`attention_backend`, `attention-backend` and `--attention-backend` are one option. What stands behind a dot is a
    name inside of the option's JSON, and stays."""
    name, dot, inner = name.removeprefix("--").partition(".")
    return f"--{name.replace('_', '-')}{dot}{inner}"


def options(values: Mapping[str, EngineArgument], *, off: bool = False) -> list[str]:
    """The command line for `values`. True is a bare flag; None leaves the engine's own default, and so does False, or
    with `off` it is the flag's opposite, `--no-...`; a list becomes several values, a dictionary JSON."""
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
        else:  # one word, so that a value may begin with a dash
            line.append(f"{option(name)}={json.dumps(value) if isinstance(value, dict) else value}")
    return line


def kv_events_config(endpoint: str | None, **further: bool) -> EngineArgument:
    """The value of both engines' `--kv-events-config`."""
    return None if endpoint is None else {"publisher": "zmq", "endpoint": endpoint, **further}


def require_said_once(
    config: StockEngineConfig,
    *,
    settings: Mapping[str, str],
    others: Mapping[str, Owner],
    environment: Mapping[str, Owner],
) -> None:
    """Raises ConfigError for an engine argument or a variable that repeats what Millrace sets.

    `settings` has every option string of the engine's for what is set, with the setting it belongs to; `others` the
    same for what has its place elsewhere, or nowhere; `environment` the variables.
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
        said = whole.partition(".")[0]
        # The engines' parsers take any beginning of an option's name for the whole, so --tens is --tensor-parallel-size
        # too.
        for known, (owner, advice) in owners.items():
            if said == known or (known.startswith(said) and said not in owners):
                raise ConfigError(f"engine.engine_args.{name} contradicts {owner}; {advice}")
    for name in config.env:
        if name in environment:
            owner, advice = environment[name]
            raise ConfigError(f"engine.env.{name} contradicts {owner}; {advice}")
