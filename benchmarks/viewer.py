"""What is behind the page: a million short samples in 2,000 files, and the metrics of 100,000 steps.

    python -m benchmarks.viewer [--samples 1000000] [--files 2000] [--steps 100000]

Prints the seconds until all files are in the table, the memory that this takes, and for each question the median of 7.
Then, what a browser is sent that opens the curves. 0 leaves a part out.
"""

import argparse
import asyncio
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import orjson
from tests.viewer.runs import Writer, write_short

from millrace.viewer import query
from millrace.viewer.details import details
from millrace.viewer.index import SampleIndex
from millrace.viewer.search import search
from millrace.viewer.server import serve_runs

ROUNDS = 7
PAGES = {
    "the newest 100 of all": {},
    "sorted by tokens, the longest first": {"sort": "-tokens"},
    "sorted by gap, after 500,000 rows": {"sort": "gap", "offset": "500000"},
    "steps 900 to 910, reward at least 0.9": {"step_min": "900", "step_max": "910", "reward_min": "0.9"},
    "status failed, sorted by reward": {"status": "failed", "sort": "-reward"},
    "one group": {"group": "1500-12", "sort": "sample"},
    "problems that contain a text": {"problem": "gsm8k-31"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=100_000)
    arguments = parser.parse_args()
    if arguments.steps:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(measure_metrics(Path(folder), arguments.steps))
    if not arguments.samples:
        return
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        write_short(Path(folder), arguments.files, arguments.samples // arguments.files)
        print(f"written: {time.monotonic() - started:.1f} s")
        asyncio.run(measure(Path(folder) / "samples"))


async def measure(folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = SampleIndex(folder)
    started = time.monotonic()
    filling = index.fill()
    rows: object = None
    while not rows:
        rows = (await index.page(query.where({}), query.page({}))).rows
    print(f"first rows: {time.monotonic() - started:.2f} s")
    await filling
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    total = (await index.page(query.where({}), query.page({}))).total
    print(f"indexed {total:,} samples of {index.indexed:,} files: {time.monotonic() - started:.1f} s, {grown:.0f} MiB")
    started = time.monotonic()
    await index.fill()
    print(f"| looking for new files | {1000 * (time.monotonic() - started):.0f} ms |")
    for name, parameters in PAGES.items():
        condition, wanted = query.where(parameters), query.page(parameters)
        await report(name, lambda condition=condition, wanted=wanted: index.page(condition, wanted))  # type: ignore[misc]
    await report("one sample by its name", lambda: one_sample(index))
    started = time.monotonic()
    async for found in search(index, query.where({}), "number 1000 250"):
        if found.rows:
            break
    print(f"| a text in a file in the middle, all newer files searched | {time.monotonic() - started:.1f} s |")
    await index.close()


async def measure_metrics(folder: Path, steps: int) -> None:
    """Open the curves of a run of so many steps."""
    writer = Writer(folder / "run")
    rows = [writer.sample("0-0", member, 0.5) for member in range(8)]
    with (folder / "run" / "metrics.jsonl").open("wb") as file:
        for writer.step in range(1, steps + 1):
            file.write(orjson.dumps(writer.metrics(rows, 0.5), option=orjson.OPT_APPEND_NEWLINE))
    size = (folder / "run" / "metrics.jsonl").stat().st_size / 1e6
    async with serve_runs(folder, "127.0.0.1", 0) as url, aiohttp.ClientSession(url) as http:
        started = time.monotonic()
        while (run := orjson.loads(await asked(http, "/api/runs"))["runs"][0])["step"] != steps:
            pass
        print(f"| metrics.jsonl of {run['step']:,} steps, {size:.0f} MB, read by the server | "
              f"{time.monotonic() - started:.1f} s |")  # fmt: skip
        started = time.monotonic()
        text = await asked(http, "/api/metrics", run="run", epoch="0", count="0")
        spent = time.monotonic() - started
        print(f"| the first answer with curves of all steps | {spent:.2f} s, {len(text) / 1e6:.1f} MB |")
        known, sent = orjson.loads(text), len(text)
        longest = spent
        while known["count"] < steps:
            begun, has = time.monotonic(), {name: str(known[name]) for name in ("epoch", "count")}
            text = await asked(http, "/api/metrics", run="run", **has, sketched=str(steps))
            longest = max(longest, time.monotonic() - begun)
            known, sent = orjson.loads(text), sent + len(text)
        print(f"| all figures, in the background | {time.monotonic() - started:.1f} s, {sent / 1e6:.1f} MB; "
              f"the longest answer {longest:.2f} s |")  # fmt: skip


async def asked(http: aiohttp.ClientSession, path: str, **parameters: str) -> bytes:
    async with http.get(path, params=parameters) as response:
        assert response.status == 200, await response.text()
        return await response.read()


async def one_sample(index: SampleIndex) -> object:
    places = await index.places(query.where({"sample": "1234-20.3", "step_min": "1234", "step_max": "1234"}), 1)
    return await index.ask(lambda cursor: details(cursor, places[0]))


async def report(name: str, question: Callable[[], Awaitable[object]]) -> None:
    times = []
    for _ in range(ROUNDS):
        started = time.monotonic()
        await question()
        times.append(1000 * (time.monotonic() - started))
    print(f"| {name} | {statistics.median(times):.0f} ms |")


if __name__ == "__main__":
    main()
