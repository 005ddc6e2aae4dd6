"""The script of each rank in test_apart.py and gpu/test_sent_parts.py: `apart_ranks.py MODEL OUT SETTINGS cpu|cuda`.

Two ranks shard a model by FSDP2, and send its parts to two engines that are apart. While version 2 is sent, the second
one is killed. It misses version 3, and gets 4 after a restart. The publish of 5 is cancelled, and both get 6. While 7
is sent, the second one stops, and misses 8. The first one gets all versions but 5.

With fewer than four GPUs, all ranks use the first one, and each is a host of its own to NCCL.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from millrace.config.engines import EngineConfig
from millrace.config.models import TransportName
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.train.world import end_rank
from millrace.weights.sharded import ShardedTensors, follow, leading
from millrace.weights.shards.members import MEMBERS, Member
from tests.conformance.run_checks import START_TIMEOUT
from tests.fleet.signals import send_signal
from tests.weights.exchanging_ranks import BUCKET, change, held, sharded_model

VERSIONS = range(1, 9)
DEADLINE = 12.0  # seconds, of a publish in which an engine stops


class Once:
    """Does something as this rank sends its fifth bucket, once."""

    def __init__(self) -> None:
        self._begin, self._sent = Member.begin, 0
        self._happens: Callable[[], object] | None = None

    def set(self, happens: Callable[[], object]) -> None:
        self._sent, self._happens = 0, happens

    def send(self, member: Member, *given: Any) -> Any:
        self._sent += 1
        if self._sent == 5 and self._happens is not None:
            self._happens()
            self._happens = None
        return self._begin(member, *given)


async def lead(sharded: ShardedTensors, folder: Path, out: Path, settings: str, once: Once) -> Any:
    """What rank 0 does, and what it found."""
    given = {"start_timeout": START_TIMEOUT, **json.loads(settings)}
    config: EngineConfig = TypeAdapter(EngineConfig).validate_python(given)
    second, found = f"{config.kind}-1", dict[str, Any]()
    transport: TransportName = "gloo" if config.device == "cpu" else "nccl"

    async def publish(fleet: Fleet, version: int, deadline: float = 300.0) -> None:
        change(sharded, version)
        began = time.monotonic()
        with leading(sharded, fleet.dtypes) as led:
            report = await fleet.publish(led, version, bucket_bytes=BUCKET, deadline=deadline)
        found[str(version)] = {
            "failed": {name: str(error) for name, error in report.failed.items()},
            "exchanged": report.exchanged,
            "seconds": time.monotonic() - began,
            "routable": sorted(fleet.snapshot.routable),
            "members": len(MEMBERS),
        }

    async with open_fleet(config, folder, transport=transport, log_dir=out) as fleet:
        await publish(fleet, 1)
        once.set(lambda: send_signal(fleet, second, signal.SIGKILL))
        await publish(fleet, 2)
        await publish(fleet, 3)
        await fleet.restart(second)
        await publish(fleet, 4)
        found["held"] = await held(fleet)
        publishing, loop = asyncio.create_task(publish(fleet, 5)), asyncio.get_running_loop()
        once.set(lambda: loop.call_soon_threadsafe(publishing.cancel))
        await asyncio.wait([publishing])
        found["cancelled"] = publishing.cancelled()
        await publish(fleet, 6)
        once.set(lambda: send_signal(fleet, second, signal.SIGSTOP))
        await publish(fleet, 7, DEADLINE)
        send_signal(fleet, second, signal.SIGCONT)
        await publish(fleet, 8)
    return found


def main() -> None:
    folder, out = map(Path, sys.argv[1:3])
    torch.set_num_threads(1)
    device = sys.argv[4]
    if device == "cuda":
        several = torch.cuda.device_count() >= 4
        if not several:
            os.environ["NCCL_HOSTID"] = f"trainer {os.environ['RANK']}"
        torch.cuda.set_device(int(os.environ["RANK"]) if several else 0)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    sharded = sharded_model(folder, device)
    if dist.get_rank() == 0:
        once = Once()
        Member.begin = lambda *given: once.send(*given)  # type: ignore[method-assign]
        found = asyncio.run(lead(sharded, folder, out, sys.argv[3], once))
        (out / "found.json").write_text(json.dumps(found))
    else:
        for version in VERSIONS:
            change(sharded, version)
            follow(sharded)
    ended = time.monotonic() + DEADLINE
    while MEMBERS and time.monotonic() < ended:  # they leave when the fleet has closed
        time.sleep(0.05)
    (out / f"left-{dist.get_rank()}.json").write_text(json.dumps(sorted(MEMBERS)))
    end_rank()


if __name__ == "__main__":
    main()
