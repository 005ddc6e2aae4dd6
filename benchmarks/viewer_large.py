"""`millrace view` on a run of 50 GB: when its page is there, what it says while it reads, and how much memory it takes.

    python -m benchmarks.viewer_large [--gigabytes 50] [--broken 20]

The files of all steps are hard links to one file of 512 samples with 2,000 tokens each, so that the run takes little
room on the disk; its pages stay in the kernel's cache, so reading them from a disk is not measured. Each broken file is
a hole of 1 GB.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tests.viewer.runs import SCHEMA, Writer

SAMPLES = 512  # of a file
TOKENS = 2000  # of a sample
SEARCH_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=50)
    parser.add_argument("--broken", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        count = write_run(run, arguments.gigabytes, arguments.broken)
        started = time.monotonic()
        command = [sys.executable, "-m", "millrace", "view", str(run), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                measure(process, started, count + arguments.broken)
            finally:
                process.terminate()


def write_run(run: Path, gigabytes: float, broken: int) -> int:
    """Write the run. Return the number of its files that can be read."""
    writer = Writer(run)
    writer.steps(3)
    for path in (run / "samples").iterdir():
        path.unlink()
    first = run / "samples" / "step-000001.parquet"
    pq.write_table(pa.Table.from_pylist(rows(writer), schema=SCHEMA), first, compression="zstd")
    count = round(gigabytes * 1e9 / first.stat().st_size)
    for step in range(2, count + 1):
        os.link(first, run / "samples" / f"step-{step:06d}.parquet")
    for step in range(count + 1, count + broken + 1):
        with (run / "samples" / f"step-{step:06d}.parquet").open("wb") as file:
            file.truncate(10**9)
    size = sum(path.stat().st_size for path in (run / "samples").iterdir())
    print(f"{count:,} files of {first.stat().st_size / 1e6:.1f} MB, {broken} broken ones, {size / 1e9:.1f} GB in all")
    return count


def rows(writer: Writer) -> list[dict[str, Any]]:
    chance = np.random.default_rng(0)
    writer.step = 1
    words = ["".join(map(chr, chance.integers(97, 123, 4))) + " " for _ in range(5000)]
    one = writer.sample("1-0", 0, 0.5)
    made = []
    for number in range(SAMPLES):
        pieces = [words[k] for k in chance.integers(0, len(words), TOKENS)]
        text = "".join(pieces)
        sequence = {
            "end": "answered", "turns": 1, "text": text, "ends": np.cumsum([len(piece) for piece in pieces]),
            "token_ids": chance.integers(0, 150_000, TOKENS), "loss_mask": np.ones(TOKENS, bool),
            "logprobs": chance.normal(size=TOKENS), "trainer_logprobs": chance.normal(size=TOKENS),
            "version_spans": [{"version": 1, "start": 0, "end": TOKENS}],
        }  # fmt: skip
        messages = json.dumps([{"role": "assistant", "content": text}])
        name, group = f"1-{number // 8}.{number % 8}", f"1-{number // 8}"
        made.append({**one, "sample": name, "group": group, "messages": messages, "sequences": [sequence]})
    return made


def measure(process: "subprocess.Popen[str]", started: float, files: int) -> None:
    assert process.stdout is not None
    said = process.stdout.readline()
    found = re.search(r"http://\S+", said)
    assert found, said
    url = found[0]

    def since() -> str:
        return f"{time.monotonic() - started:.1f} s"

    ask(url, "runs")
    print(f"| the page is served | {since()}, {memory(process.pid, 'VmRSS'):.0f} MiB |")
    shown: list[str] = []
    first = ""
    while (page := ask(url, "samples", run="run", limit="100"))["filling"] or not page["files"]:
        first = first or (page["rows"] and since())
        shown.append(f"{page['indexed']:,} of {page['files']:,}")
        time.sleep(0.2)
    assert page["indexed"] == page["files"] == files
    print(f"| first rows | {first} |")
    print(f"| progress that the page showed | {', '.join(dict.fromkeys(shown[:: max(1, len(shown) // 5)]))} files |")
    print(f"| all {page['total']:,} samples | {since()} |")
    print(f"| memory now, and at most | {memory(process.pid, 'VmRSS'):.0f}, {memory(process.pid, 'VmHWM'):.0f} MiB |")
    print(f"| said of the broken files | {'; '.join(page['problems'])} |")
    begun = time.monotonic()
    ask(url, "samples", run="run", sort="-tokens")
    print(f"| sorted by tokens | {time.monotonic() - begun:.2f} s |")
    begun = time.monotonic()
    ask(url, "tokens", run="run", step="1", sample="1-9.3")
    print(f"| the tokens of one sample | {time.monotonic() - begun:.2f} s |")
    begun = time.monotonic()
    with urllib.request.urlopen(f"{url}/api/search?run=run&q=no+such+text", timeout=60) as answer:
        read = 0
        while time.monotonic() - begun < SEARCH_SECONDS:
            read = json.loads(answer.readline()).get("read", read)
    print(f"| files in which a text was searched for in {SEARCH_SECONDS:.0f} s | {read} |")
    print(f"| memory at most | {memory(process.pid, 'VmHWM'):.0f} MiB |")


def ask(url: str, route: str, **parameters: str) -> Any:
    with urllib.request.urlopen(f"{url}/api/{route}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:
        return json.load(answer)


def memory(pid: int, name: str) -> float:
    """Return a figure of a process's memory in MiB."""
    return int(re.findall(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) / 1024


if __name__ == "__main__":
    main()
