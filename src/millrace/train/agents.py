"""The agent of a run, and the gateway through which it talks to the engines."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from millrace.agents.job import Agent
from millrace.agents.player import AgentPlayer
from millrace.config.gateway import GatewayConfig
from millrace.config.models import RunConfig
from millrace.errors import ConfigError
from millrace.fleet.client import FleetClient
from millrace.gateway.format import TurnFormat, load_format
from millrace.gateway.server import serve_gateway

FOLDER = "agents"  # of the run's folder: it has the folders of the samples


def agent_format(config: RunConfig, model: str) -> TurnFormat | None:
    """Return how the gateway writes conversations, or None without an agent.

    model: a folder or a name on the Hub. Raises ConfigError or DataError if the format can't be used.
    """
    if config.agent is None:
        return None
    gateway = config.gateway or GatewayConfig()
    return load_format(model, gateway.format, config.rollout.chat_template_kwargs)


@asynccontextmanager
async def open_player(
    config: RunConfig, agent: Agent | None, turns: TurnFormat | None, fleet: FleetClient, ranks: int
) -> AsyncIterator[AgentPlayer | None]:
    """Serve the gateway, and yield what plays samples by the agent; None without an agent.

    Raises ConfigError if the gateway's port can't be bound.
    """
    if config.agent is None or agent is None or turns is None:
        yield None
        return
    settings = config.gateway or GatewayConfig()
    if ranks > 1 and settings.port:
        raise ConfigError("under torchrun every rank has a gateway of its own: leave out torchrun or gateway.port")
    settings = settings.model_copy(update={"retries": config.rollout.sample_retries})
    async with serve_gateway(fleet, turns, key=secrets.token_urlsafe(24), config=settings) as gateway:
        yield AgentPlayer(gateway, agent, config.agent.rewarded(functions=config.reward is not None))
