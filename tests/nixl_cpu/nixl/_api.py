"""What the engines need of NIXL."""

from typing import Any

from nixl_cu12 import _api
from nixl_cu12._api import nixl_agent_config, nixl_thread_sync_t

__all__ = ["nixl_agent", "nixl_agent_config", "nixl_thread_sync_t"]


class nixl_agent(_api.nixl_agent):  # type: ignore[misc]
    """An agent that takes the host's memory for a GPU's. SGLang calls its KV cache `VRAM` on every device."""

    def register_memory(self, reg_list: Any, mem_type: str | None = None, **others: Any) -> Any:
        return super().register_memory(reg_list, of_host(mem_type), **others)

    def get_xfer_descs(self, descs: Any, mem_type: str | None = None) -> Any:
        return super().get_xfer_descs(descs, of_host(mem_type))

    def prep_xfer_dlist(self, agent_name: str, xfer_list: Any, mem_type: str | None = None, **others: Any) -> Any:
        return super().prep_xfer_dlist(agent_name, xfer_list, of_host(mem_type), **others)


def of_host(mem_type: str | None) -> str | None:
    return "DRAM" if mem_type == "VRAM" else mem_type
