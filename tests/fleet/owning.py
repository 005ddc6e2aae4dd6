"""A process that owns a fleet and shares it. It does what each line of its input says.

python owning.py MODEL PORT KEY CONFIG OPTIONS

PORT, KEY: where the fleet is shared. CONFIG: the engines, and OPTIONS: further arguments of `open_fleet`, both as JSON.
`publish SCALE LABEL` publishes the model's weights times SCALE.
`stop SCALE` does the same, and stops in the middle for ever. `end` ends the process in order. After each line the
process prints the fleet's version and the versions that its engines serve.
"""

import asyncio
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from millrace import open_fleet

MODEL, PORT, KEY, CONFIG, OPTIONS = sys.argv[1:]
Tensors = list[tuple[str, torch.Tensor]]


def stopping(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    yield from itertools.islice(tensors, 3)
    print(json.dumps({"stopped": True}), flush=True)
    threading.Event().wait()


async def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    logs = Path(MODEL).parent
    async with (
        open_fleet(json.loads(CONFIG), MODEL, log_dir=logs, **json.loads(OPTIONS)) as fleet,
        fleet.share(port=int(PORT), key=KEY),
    ):
        while True:
            serves = [state.version for state in fleet.snapshot.replicas if state.routable]
            print(json.dumps({"version": fleet.version, "serves": serves}), flush=True)
            match (await asyncio.to_thread(sys.stdin.readline)).split(maxsplit=2):
                case ["publish", scale, label]:
                    tensors = [(name, p.detach() * float(scale)) for name, p in model.named_parameters()]
                    await fleet.publish(tensors, label=label.strip())
                case ["stop", scale]:
                    tensors = [(name, p.detach() * float(scale)) for name, p in model.named_parameters()]
                    await fleet.publish(stopping(tensors), bucket_bytes=2**16, deadline=600.0)
                case _:
                    return


asyncio.run(main())
