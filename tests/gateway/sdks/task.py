"""The task of all clients: two tools, one after the other, and an answer. Runs in an environment without Millrace."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

QUESTION = "How is the weather in Zürich, and what time is it?"
SCHEMAS: dict[str, dict[str, Any]] = {
    name: {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    for name, argument in (("weather", "city"), ("clock", "zone"))
}


def weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: Where.
    """
    return f"It is sunny in {city}."


def clock(zone: str) -> str:
    """Tells the time.

    Args:
        zone: Of the time.
    """
    return f"It is noon, {zone}."


TOOLS: dict[str, Callable[..., str]] = {"weather": weather, "clock": clock}


@dataclass(frozen=True)
class Site:
    """The episode that a client talks to. url: without `/v1`. streamed: whether the client asks for streams."""

    url: str
    key: str
    protocol: str
    streamed: bool


def main(play: Callable[[Site], str], ask: Callable[[Site], tuple[int, int]]) -> None:
    """Prints what came of each job. The argument is a list of jobs: a URL, a key, a protocol and what to do.

    `whole` and `streamed` play the task, which gives the answer. `once` asks one question, for the numbers of tokens of
    the prompt and of the answer, which has 8 at most.
    """
    jobs = [
        (Site(url, key, protocol, mode == "streamed"), mode) for url, key, protocol, mode in json.loads(sys.argv[1])
    ]
    print(json.dumps([ask(site) if mode == "once" else play(site) for site, mode in jobs]))
