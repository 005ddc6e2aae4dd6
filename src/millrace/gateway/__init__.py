"""The agent gateway: any agent that speaks a protocol of OpenAI or Anthropic becomes a source of rollouts."""

from typing import TYPE_CHECKING

from millrace.lazy import exports

if TYPE_CHECKING:
    from millrace.gateway.format import TurnFormat, load_format
    from millrace.gateway.gateway import Gateway, OpenEpisode
    from millrace.gateway.rules import EpisodeRules
    from millrace.gateway.samples import GatewaySample
    from millrace.gateway.server import serve_gateway

__getattr__, __dir__ = exports(
    __name__,
    {
        "millrace.gateway.format": ["TurnFormat", "load_format"],
        "millrace.gateway.gateway": ["Gateway", "OpenEpisode"],
        "millrace.gateway.rules": ["EpisodeRules"],
        "millrace.gateway.samples": ["GatewaySample"],
        "millrace.gateway.server": ["serve_gateway"],
    },
)

__all__ = ["EpisodeRules", "Gateway", "GatewaySample", "OpenEpisode", "TurnFormat", "load_format", "serve_gateway"]
