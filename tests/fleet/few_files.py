"""A client that may open few files: python -m tests.fleet.few_files MODEL LOGS HOST FILES REQUESTS

It is a separate process, since it lowers its own limits. It starts an engine, sends all requests at once, and prints
their outcomes as JSON.
"""

import asyncio
import json
import resource
import sys
from pathlib import Path

from millrace.config import EmbeddedEngineConfig
from millrace.fleet.local import open_fleet
from millrace.types import GenerateRequest, Generation, SamplingParams


async def main(model: str, logs: str, host: str, files: int, requests: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    config = EmbeddedEngineConfig(kind="embedded", threads=1, host=host, max_running_requests=2 * files)
    async with open_fleet(config, Path(model), log_dir=Path(logs)) as fleet:
        sampling = SamplingParams(4, ignore_eos=True)
        asked = (
            fleet.generate(GenerateRequest((5, 17, 42), sampling, request_id=f"r{n}"), deadline=120)
            for n in range(requests)
        )
        made = await asyncio.gather(*asked, return_exceptions=True)
        result = {
            "lengths": [len(one.output_ids) if isinstance(one, Generation) else repr(one) for one in made],
            "members": [[state.url, state.phase, state.failures] for state in fleet.snapshot.replicas],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    model, logs, host, files, requests = sys.argv[1:]
    asyncio.run(main(model, logs, host, int(files), int(requests)))
