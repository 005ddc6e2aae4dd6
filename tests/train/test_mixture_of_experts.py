"""`millrace train` with each engine on a mixture of experts in bfloat16, the usual dtype on the Hub."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from millrace.train.sample_files import read_samples
from tests.architectures import make_moe_folder

STEPS = 3
ENGINES: dict[str, dict[str, object]] = {
    "embedded": {"kind": "embedded"},
    "sglang": {"kind": "sglang", "version": "0.5.23"},
    "sglang, replayed": {"kind": "sglang", "version": "0.5.23", "return_routed_experts": True},
    "vllm": {"kind": "vllm", "version": "0.32.0"},
}
CONFIG = f"""
name: run
model: {{kind: pretrained, path: model}}
data: {{kind: generated, seed: 1, problems: 64}}
rollout: {{groups_per_step: 2, samples_per_group: 4, max_turn_tokens: 24, max_sample_tokens: 256}}
train: {{steps: {STEPS}, lr: 1e-3, threads: 1}}
evaluation: {{data: {{kind: generated, seed: 3, problems: 8}}, problems: 4, every: {STEPS}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    make_moe_folder(folder / "model", dtype=torch.bfloat16)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def test_it_is_stored_as_stock_engines_expect(folder: Path) -> None:
    with safe_open(folder / "model" / "model.safetensors", framework="pt") as file:
        expert = file.get_tensor("model.layers.0.mlp.experts.3.gate_proj.weight")
    assert expert.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "embedded" else []) for name in ENGINES]
)
def test_three_steps(
    name: str, folder: Path, tmp_path: Path, sglang_python: Callable[[str], Path], vllm_python: Path
) -> None:
    engine = {**ENGINES[name], "device": "cpu", "threads": 1}
    if name != "embedded":
        python = vllm_python if name == "vllm" else sglang_python(str(engine["version"]))
        engine["python"] = str(python)
    command = [sys.executable, "-m", "millrace", "train", "config.yaml"]
    command += [f"engine={json.dumps(engine)}", f"output_dir={json.dumps(str(tmp_path))}"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["weight_version"] for line in lines] == list(range(1, STEPS + 2))
    # The engine computes in bfloat16 and the trainer in float32. Their logprobs are close. They are further apart if a
    # version is old or an expert is in another one's place.
    gaps = [line["logprob_gap"] for line in lines[1:]]
    assert all(0 < gap < 0.05 for gap in gaps), gaps
    assert {one["newest_version"] for one in read_samples(tmp_path / "run")} >= set(range(1, STEPS + 1))
