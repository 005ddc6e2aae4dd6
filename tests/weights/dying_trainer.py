"""A trainer that is killed in the middle of a publish to a running SGLang: by gloo, at the broadcast with this number.

python -m tests.weights.dying_trainer URL KEY ADMIN_KEY FOLDER VERSION NUMBER

At number 0, the server's rank waits for the bucket that it was ordered to load. Later ones come ahead of their order.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

import torch

from millrace.engines.sglang.adapter import SGLangEngine
from millrace.weights.publisher import Publish
from millrace.weights.source import source_of
from millrace.weights.transports.base import PublishTarget
from millrace.weights.transports.sending_group import SendingGroup
from millrace.weights.transports.whole_broadcast import GlooTransport
from tests.weights.variants import read_folder

BUCKET = 100 * 1024  # bytes


class Dying(SendingGroup):
    """Kills this process instead of sending the bucket with the number `last`."""

    last = 0

    async def broadcast_bucket(self, number: int, bucket: torch.Tensor) -> None:
        if number == self.last:
            if self._group is None:
                await self.join()  # the rank joins when it has the order
            print("dies", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        await super().broadcast_bucket(number, bucket)


async def run(url: str, key: str, admin_key: str, folder: Path, version: int) -> None:
    engine = SGLangEngine("sglang-0", url, api_key=key, admin_key=admin_key, model_path=folder)
    await engine.initialize()
    transport = GlooTransport(Dying, torch.device("cpu"), together=False)
    target = PublishTarget(engine, await engine.info())
    source = source_of(read_folder(folder).items())
    report = await Publish([target], source, version, transport, bucket_bytes=BUCKET, deadline=60).run()
    raise AssertionError(report)


if __name__ == "__main__":
    Dying.last = int(sys.argv[6])
    asyncio.run(run(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5])))
