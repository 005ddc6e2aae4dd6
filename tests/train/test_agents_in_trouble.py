"""Runs with agents whose engine is killed, and runs with agents on two ranks: real processes and real engines."""

import asyncio
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from millrace.config import dump_config
from millrace.rollout.sample import SampleStatus
from tests.engines.processes import below, command_lines
from tests.torchrun import torchrun
from tests.train.test_agents import agent_settings, command
from tests.train.test_own_rewards import run, samples, settings

WAIT = 120.0  # seconds for any single thing to happen
LONG = 96  # tokens of a turn
# Two streamed turns, after the file of the engine's processes is there. With the first token of its second turn, an
# agent kills them: the test itself would come too late on a busy machine.
STREAMS = """
import pathlib, signal, time

engines = pathlib.Path(__file__).with_name("engines")
while not engines.exists():
    time.sleep(0.01)

def kill_the_engine():
    for pid in map(int, engines.read_text().split()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # another agent did it

def streamed(*texts):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    body = json.dumps({"model": "any", "stream": True, "messages": messages}).encode()
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    said = ""
    for line in urllib.request.urlopen(request):
        if line.startswith(b"data: {"):
            said += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            if said and len(texts) > 1:
                kill_the_engine()
    return said

streamed("hello", streamed("hello"), "and again")
"""


def engines() -> set[int]:
    """The embedded engines of this process."""
    return {pid for pid in below(os.getpid()) if "millrace.engines.embedded" in command_lines({pid})}


async def name_the_engine(run: Path) -> None:
    """Writes the file of the engine's processes once the first agents run."""
    end = time.monotonic() + WAIT
    while not list((run / "agents").glob("*")):
        assert time.monotonic() < end, "no agent has begun"
        await asyncio.sleep(0.01)
    (run.parent / "names").write_text(" ".join(map(str, engines())))
    (run.parent / "names").rename(run.parent / "engines")


async def test_an_engine_that_is_killed_is_a_pause_for_its_agents(tmp_path: Path) -> None:
    rollout = {
        "groups_per_step": 2, "samples_per_group": 4, "max_turn_tokens": LONG, "max_sample_tokens": 240,
        "sample_retries": 4,
    }  # fmt: skip
    running = asyncio.create_task(run(settings(tmp_path, agent=command(tmp_path, STREAMS), rollout=rollout)))
    await name_the_engine(tmp_path / "run")
    summary = await running
    assert summary.counts.ended[SampleStatus.FINISHED] == summary.counts.asked == 16
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    kinds = Counter(event["kind"] for event in events)
    assert kinds["restart"] == 1
    assert kinds["retry"] > 0
    for sample in samples(tmp_path):
        assert (sample["reward"], sample["turns"], sample["counts"]) == (1.0, 2, {"requests": 2})
        [sequence] = sample["sequences"]
        spans = sum(span["end"] - span["start"] for span in sequence["version_spans"])
        assert spans == sum(sequence["loss_mask"]) == sample["tokens"]
    assert all(step.logprob_gap is not None and step.logprob_gap < 1e-4 for step in summary.metrics[1:])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_each_rank_plays_its_own_agents(tmp_path: Path) -> None:
    code = 'ask("Say anything."); ask("Another one.")'
    config = agent_settings(tmp_path, command(tmp_path, code), train={"steps": 2, "lr": 1e-3, "threads": 1})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    torchrun("-m", "millrace", "train", str(tmp_path / "run.yaml"))
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [(step["samples_finished"], step["weight_version"]) for step in metrics] == [(0, 1), (8, 2), (8, 3)]
    assert [(step["branches"], step["requests"]) for step in metrics[1:]] == [(2.0, 16), (2.0, 16)]
    assert all(step["logprob_gap"] < 1e-4 for step in metrics[1:])
    problems = []
    for rank in (0, 1):
        played = [sample for sample in samples(tmp_path) if sample["sample"].startswith(f"rank{rank}-")]
        assert Counter(sample["step"] for sample in played) == {1: 4, 2: 4}
        problems.append({sample["problem"] for sample in played})
        for sample in played:
            assert (len(sample["sequences"]), sample["turns"], sample["counts"]["requests"]) == (2, 2, 2)
            assert (sample["oldest_version"], sample["newest_version"]) == (sample["step"], sample["step"])
    assert not problems[0] & problems[1]
    assert not sum(step["agents_failed"] for step in metrics)
