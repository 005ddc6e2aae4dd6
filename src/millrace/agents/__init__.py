"""Agents that play samples through the gateway: commands and functions of the user, and the port to what runs them."""

from typing import TYPE_CHECKING

from millrace.lazy import exports

if TYPE_CHECKING:
    from millrace.agents.base import AgentCommand, AgentRunner
    from millrace.agents.local import LocalRunner

__getattr__, __dir__ = exports(
    __name__,
    {
        "millrace.agents.base": ["AgentCommand", "AgentRunner"],
        "millrace.agents.local": ["LocalRunner"],
    },
)

__all__ = ["AgentCommand", "AgentRunner", "LocalRunner"]
