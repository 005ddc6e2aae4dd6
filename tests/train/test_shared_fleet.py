"""`millrace train` under torchrun: two ranks share one fleet, and each rank sends its own requests."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from pyarrow import parquet

from millrace.config import RunConfig
from millrace.errors import ConfigError
from millrace.train.ranks import require_many_ranks
from millrace.train.sample_files import read_samples, sample_files
from tests.torchrun import torchrun

CONFIG = """\
name: run
model: {{kind: pretrained, path: {model}}}
engine: {{kind: embedded, replicas: 2, threads: 1}}
data: {{kind: generated, seed: 1, problems: 64}}
rollout: {{groups_per_step: 4, samples_per_group: 2, max_turns: 2, max_turn_tokens: 16, max_sample_tokens: 160}}
train: {{steps: 2, lr: 1e-3, threads: 1}}
evaluation: {{data: {{kind: generated, seed: 3, problems: 6}}, every: 1000}}
checkpoint: {{every: 1}}
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def samples_of(run: Path, rank: int) -> list[dict[str, Any]]:
    """Return the samples of a rank, of which the other has none."""
    files = [path for path in sample_files(run) if ("rank1" in path.name) == bool(rank)]
    own = [sample for sample in read_samples(run) if sample["sample"].startswith(f"rank{rank}-")]
    assert len(own) == sum(parquet.read_metadata(path).num_rows for path in files)
    return own


def check(run: Path, steps: int) -> None:
    """Each step trained on two groups of each rank, fresh enough, and no sample came twice."""
    metrics = lines(run / "metrics.jsonl")
    assert [step["samples_finished"] for step in metrics] == [0] + [8] * steps
    assert [step["weight_version"] for step in metrics] == list(range(1, steps + 2))
    seen: Counter[str] = Counter()
    for rank in (0, 1):
        samples = samples_of(run, rank)
        assert Counter(sample["step"] for sample in samples) == dict.fromkeys(range(1, steps + 1), 4)
        assert {sample["status"] for sample in samples} == {"finished"}
        seen.update(sample["sample"] for sample in samples)
        for sample in samples[:8]:  # in mode hybrid, all are of the version that was published before the step
            assert (sample["oldest_version"], sample["newest_version"]) == (sample["step"], sample["step"])
        assert all(sample["advantage"] is not None and sample["gap"] < 1e-4 for sample in samples)
    assert set(seen.values()) == {1}
    problems = [{sample["problem"] for sample in samples_of(run, rank)} for rank in (0, 1)]
    assert not problems[0] & problems[1]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"engine": {"kind": "sglang", "prefill_decode": {}}}, None),
        ({"router": "vllm", "engine": {"kind": "vllm"}}, "leave out torchrun or router"),
        ({"engine": {"kind": "vllm", "prefill_decode": {}}}, None),
    ],
)
def test_what_needs_one_rank_is_refused_before_an_engine_starts(changes: dict[str, Any], why: str | None) -> None:
    config = RunConfig.model_validate({**yaml.safe_load(CONFIG.format(model="m")), **changes})
    with nullcontext() if why is None else pytest.raises(ConfigError, match=why):
        require_many_ranks(config)


@pytest.mark.slow
def test_two_ranks_send_their_own_requests_and_go_on_from_their_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    (config := tmp_path / "run.yaml").write_text(CONFIG.format(model=tiny_model))
    said = torchrun("-m", "millrace", "train", str(config), f"output_dir={tmp_path}")
    run = tmp_path / "run"
    check(run, 2)
    assert "16 samples asked for: 16 finished" in said
    # Rank 1 sends its requests itself, so rank 0 knows nothing of them.
    for name, asked in (("events.jsonl", 14), ("events-1.jsonl", 14)):
        requests = [event for event in lines(run / name) if event["kind"] == "request"]
        assert len(requests) >= asked
        assert {event["outcome"] for event in requests} == {"finished"}
    more = ("train.steps=3", "mode=standalone", "--resume")
    torchrun("-m", "millrace", "train", str(config), f"output_dir={tmp_path}", *more)
    check(run, 3)
