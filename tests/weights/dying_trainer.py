"""A trainer that is killed in the middle of a publish to a running server: by gloo, at the broadcast with this number.

python -m tests.weights.dying_trainer KIND URL KEY ADMIN_KEY FOLDER VERSION NUMBER

KIND is sglang or vllm. At number 0, the server's rank waits for the bucket that it was ordered to load. Later ones come
ahead of their order.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from millrace.engines.sglang.adapter import SGLangEngine
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.weights.publisher import Publish
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget
from millrace.weights.transports.sending_group import SendingGroup
from millrace.weights.transports.whole_broadcast import GlooTransport
from tests.weights.variants import read_folder

BUCKET = 100 * 1024  # bytes
ENGINES: dict[str, type[SGLangEngine | VLLMEngine]] = {"sglang": SGLangEngine, "vllm": VLLMEngine}


class Dying(SendingGroup):
    """Kills this process instead of sending the bucket with the number `last`. The first one has been announced then,
    and the server's rank has joined."""

    last = 0

    async def _send(self, begin: Callable[[], Sequence[Any]]) -> None:
        if self._announced > self.last:
            print("dies", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        await super()._send(begin)


async def run(kind: str, url: str, key: str, admin_key: str, folder: Path, version: int) -> None:
    engine = ENGINES[kind](f"{kind}-0", url, api_key=key, admin_key=admin_key, model_path=folder)
    await engine.initialize()
    transport = GlooTransport(Dying, torch.device("cpu"), together=False)
    target = PublishTarget(engine, await engine.info())
    source = source_of(read_folder(folder).items())
    report = await Publish([target], source, version, transport, bucket_bytes=BUCKET, deadline=60).run()
    raise AssertionError(report)


if __name__ == "__main__":
    kind, url, key, admin_key, folder, version, number = sys.argv[1:]
    Dying.last = int(number)
    asyncio.run(run(kind, url, key, admin_key, Path(folder), int(version)))
