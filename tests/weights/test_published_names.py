"""Real engines take the tensors of any trainer, and then generate the same tokens as the trainer's model."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.config.engines import EmbeddedEngineConfig, SGLangEngineConfig, VLLMEngineConfig
from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import GenerateRequest, SamplingParams
from millrace.weights.folder import folder_checksums
from tests.architectures import make_moe_folder

PROMPT, TOKENS = (5, 17, 42, 99, 3), 8

Engine = EmbeddedEngineConfig | SGLangEngineConfig | VLLMEngineConfig


@torch.no_grad()
def changed(folder: Path) -> PreTrainedModel:
    """Returns the folder's model as after a training step."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@torch.no_grad()
def greedy(model: PreTrainedModel) -> tuple[Sequence[int], Sequence[float]]:
    ids, logprobs = list(PROMPT), []
    for _ in range(TOKENS):
        logits = model(torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
        logprobs.append(float(torch.log_softmax(logits, -1)[ids[-1]]))
    return ids[len(PROMPT) :], logprobs


async def serves(fleet: Fleet, model: PreTrainedModel, version: int) -> None:
    params = SamplingParams(max_new_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    made = await fleet.generate(GenerateRequest(PROMPT, params, request_id=f"version-{version}"), deadline=120)
    ids, logprobs = greedy(model)
    assert (made.version_spans[-1].version, list(made.output_ids)) == (version, ids)
    assert made.logprobs == pytest.approx(logprobs, abs=5e-3)


async def takes_a_mixture_of_experts(config: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    before = make_moe_folder(folder)
    model = changed(folder)
    async with open_fleet(config, folder, log_dir=tmp_path / "logs", folder=tmp_path / "versions") as fleet:
        await serves(fleet, before, 0)
        report = await fleet.publish(list(model.named_parameters()), 1, bucket_bytes=64 * 1024)
        assert not report.failed
        await serves(fleet, model, 1)
        with pytest.raises(PublishError, match=r"2 of \d+ tensors|lacks 2 of"):
            lacking = [(name, one) for name, one in model.named_parameters() if "norm" not in name or "layers" in name]
            await fleet.publish([one for one in lacking if one[0] != "lm_head.weight"], 2)
        wrapped = [(f"module.{name}", tensor) for name, tensor in before.state_dict().items()]
        assert not (await fleet.publish(wrapped, 3)).failed
        await serves(fleet, before, 3)
    assert folder_checksums(tmp_path / "versions" / "version-00000003") == folder_checksums(folder)


async def test_the_embedded_engine_takes_a_mixture_of_experts(tmp_path: Path) -> None:
    await takes_a_mixture_of_experts(EmbeddedEngineConfig(kind="embedded", replicas=1, threads=1), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.5.23", "0.5.15"])
async def test_sglang_takes_a_mixture_of_experts(
    version: str, sglang_python: Callable[[str], Path], tmp_path: Path
) -> None:
    python = sglang_python(version)
    await takes_a_mixture_of_experts(
        SGLangEngineConfig(kind="sglang", replicas=1, device="cpu", python=python), tmp_path
    )


@pytest.mark.slow
async def test_vllm_takes_a_mixture_of_experts(vllm_python: Path, tmp_path: Path) -> None:
    config = VLLMEngineConfig(kind="vllm", replicas=1, device="cpu", python=vllm_python)
    await takes_a_mixture_of_experts(config, tmp_path)


@pytest.mark.slow
async def test_the_embedded_engine_takes_a_folder_with_redundant_tensors(tiny_model: Path, tmp_path: Path) -> None:
    """The folder has a stored tied head, a buffer of an older model, shards with an index beside an older single file,
    and the same weights in another format."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    index(folder, tensors)
    save_file({"layers.0.wq.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    model = changed(folder)
    config = EmbeddedEngineConfig(kind="embedded", replicas=1, threads=1)
    async with open_fleet(config, folder, log_dir=tmp_path / "logs", folder=tmp_path / "versions") as fleet:
        assert [state.version for state in fleet.snapshot.routable.values()] == [0]
        assert not (await fleet.publish(list(model.named_parameters()), 1)).failed
        await serves(fleet, model, 1)
        assert not (await fleet.publish(list(model.state_dict().items()), 2)).failed
        await serves(fleet, model, 2)
        untied = [*model.named_parameters(), ("lm_head.weight", torch.zeros_like(tensors["lm_head.weight"]))]
        with pytest.raises(PublishError, match="lm_head.weight differ"):
            await fleet.publish(untied, 3)
        await serves(fleet, model, 2)
    assert folder_checksums(tmp_path / "versions" / "version-00000002").keys() == tensors.keys()


def index(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Stores the tensors in two files and an index, and leaves an older single file beside them."""
    files: dict[str, str] = {}
    for number in range(2):
        some = {name: tensors[name] for name in sorted(tensors)[number::2]}
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file(some, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    old = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
