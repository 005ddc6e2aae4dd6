"""What commands of agents share that play one sample with another library. It uses only the standard library."""

import asyncio
import json
import signal
import sys
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

LONGEST_LINE = 1000  # characters
TERMINATED = 128 + signal.SIGTERM


def row_of_sample() -> Mapping[str, Any]:
    """Return the sample's row. Raises ValueError if it has no column `task`."""
    row: dict[str, Any] = json.loads(Path("row.json").read_bytes())
    if "task" not in row:
        raise ValueError(f"the row has no column `task`, which names what to play; it has: {', '.join(row) or 'none'}")
    return row


def write_reward(reward: float, parts: Mapping[str, float]) -> None:
    """Write the sample's reward, as `agent.reward: file` reads it."""
    Path("reward.json").write_text(json.dumps({"reward": reward, "parts": dict(parts)}))


async def until_terminated(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of the work. SIGTERM cancels it, and it may clean up. Raises CancelledError then."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def failed(where: str, kind: str, message: str) -> int:
    """Say what failed, in one line, and return the exit status."""
    line = f"{where}: {kind}: {' '.join(message.split())}".removesuffix(": ")
    print(line[:LONGEST_LINE], file=sys.stderr)
    return 1
