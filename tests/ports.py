"""Ports of servers that tests start."""

import asyncio


async def listens(port: int) -> bool:
    """Whether a server accepts connections at the port."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
