"""What vLLM needs of NIXL."""

from nixl_cu12._api import nixl_agent, nixl_agent_config

__all__ = ["nixl_agent", "nixl_agent_config"]
