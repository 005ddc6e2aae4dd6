"""The Ray actor of one node of an engine. It starts the node's server below a guard, on the actor's host."""

import ray.util

from millrace.errors import LaunchError
from millrace.launch.remote import RemoteNode


class NodeActor:
    """One node. Errors are returned as text, since Ray would wrap them."""

    def __init__(self) -> None:
        self._node = RemoteNode()

    async def where(self) -> dict[str, str | None]:
        """Return the host's address and its id in Ray, the assigned GPUs, and the interpreter."""
        node = ray.get_runtime_context().get_node_id()
        return {"host": ray.util.get_node_ip_address(), "node": node, **await self._node.where()}

    async def free_ports(self, host: str, count: int) -> int | str:
        """Return the first of `count` consecutive free ports, or what is wrong."""
        try:
            return await self._node.free_ports(host, count)
        except LaunchError as error:
            return str(error)

    async def start(
        self, name: str, command: list[str], log_path: str, env: dict[str, str], leftovers: list[str]
    ) -> str | None:
        """Start the server. Returns what is wrong if it can't be started."""
        try:
            await self._node.start(name, command, log_path, env, leftovers)
        except LaunchError as error:
            return str(error)
        return None

    async def watch(self) -> tuple[bool, str, str]:
        """Wait for the end of the server, or a second. See `RemoteNode.watch`."""
        return await self._node.watch()

    async def end(self) -> str | None:
        """End the server. Returns what is wrong if it does not end."""
        try:
            await self._node.end()
        except LaunchError as error:
            return str(error)
        return None
