"""LoRA in the embedded engine: rows of one pass with different adapters, and folders that hold no usable adapter."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from millrace.weights.lora import write_lora
from tests.engines.embedded.conftest import Api, logprobs_of, reported_logprobs
from tests.lora import CONFIG, lora, merged

PROMPTS = ([7], list(range(20, 60)), [5, 9, 33, 2], list(range(20, 50)), list(range(90, 200)))


@pytest.fixture(scope="module")
def folders(base: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    return [write_lora(place, "a", seed, dict(lora(base, seed)), CONFIG).path for seed in (1, 2)]


async def unload(api: Api, *names: str) -> None:
    for name in names:
        await api.post("/unload_lora_adapter", {"lora_name": name})


async def test_each_row_is_computed_by_its_own_adapter(api: Api, base: Any, folders: list[Path]) -> None:
    """The prompts have different lengths, so the pass over them is padded. Some share a beginning."""
    makers: dict[str | None, Any] = {None: base}
    for number, folder in enumerate(folders):
        await api.post("/load_lora_adapter", {"lora_name": f"row{number}", "lora_path": str(folder)})
        makers[f"row{number}"] = merged(base, lora(base, number + 1))
    asked = [(prompt, name) for prompt in PROMPTS for name in makers]

    async def ask(prompt: list[int], name: str | None) -> Any:
        sampling = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, "lora_path": name}
        return await api.post("/generate", body)

    for _ in range(2):  # the second time uses cached prefixes
        answers = await asyncio.gather(*(ask(prompt, name) for prompt, name in asked))
        for (prompt, name), answer in zip(asked, answers, strict=True):
            expected = logprobs_of(makers[name], prompt, answer["output_ids"])
            assert reported_logprobs(answer) == pytest.approx(expected, abs=2e-3)
    await unload(api, "row0", "row1")


async def test_an_unloaded_adapter_serves_running_requests_and_no_new_ones(
    api: Api, base: Any, folders: list[Path]
) -> None:
    await api.post("/load_lora_adapter", {"lora_name": "gone", "lora_path": str(folders[0])})
    await api.post("/inject_fault", {"kind": "slow", "seconds": 0.01})
    sampling = {"max_new_tokens": 40, "temperature": 0.0, "ignore_eos": True}
    body = {"input_ids": [5, 9, 33], "sampling_params": sampling, "return_logprob": True, "lora_path": "gone"}
    running = asyncio.create_task(api.post("/generate", body))
    await api.until_running(1)
    await unload(api, "gone")
    assert "no LoRA adapter gone is loaded" in await api.refused("/generate", body)
    assert "no LoRA adapter gone is loaded" in await api.refused("/unload_lora_adapter", {"lora_name": "gone"})
    answer = await running
    expected = logprobs_of(merged(base, lora(base, 1)), [5, 9, 33], answer["output_ids"])
    assert reported_logprobs(answer) == pytest.approx(expected, abs=2e-3)


async def test_new_weights_continue_without_the_adapter_of_the_old_ones(
    api: Api, base: Any, other: Any, other_dir: Path, folders: list[Path]
) -> None:
    """The running request is retracted, so that nothing remains of what the old weights had computed."""
    await api.post("/load_lora_adapter", {"lora_name": "old", "lora_path": str(folders[0])})
    await api.post("/inject_fault", {"kind": "slow", "seconds": 0.01})
    sampling = {"max_new_tokens": 60, "temperature": 0.0, "ignore_eos": True}
    body = {"input_ids": [5, 9, 33], "sampling_params": sampling, "return_logprob": True, "lora_path": "old"}
    running = asyncio.create_task(api.post("/generate", body))
    await api.until_running(1)
    await api.post("/pause_generation", {"mode": "retract"})
    await api.post("/update_weights_from_disk", {"model_path": str(other_dir), "weight_version": "1"})
    await api.post("/load_lora_adapter", {"lora_name": "new", "lora_path": str(folders[1])})
    await api.post("/continue_generation")
    answer = await running
    [_, second] = answer["meta_info"]["weight_versions"]
    output, start = answer["output_ids"], second["start"]
    with_lora = logprobs_of(merged(base, lora(base, 1)), [5, 9, 33], output[:start])
    alone = logprobs_of(other, [5, 9, 33, *output[:start]], output[start:])
    assert reported_logprobs(answer) == pytest.approx(with_lora + alone, abs=2e-3)
    late = await api.post("/generate", body)  # this request names the old adapter, which is gone
    assert reported_logprobs(late) == pytest.approx(logprobs_of(other, [5, 9, 33], late["output_ids"]), abs=2e-3)
    await unload(api, "new")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_rslora": True}, "needs use_rslora"),
        ({"bias": "all"}, "needs bias"),
        ({"rank_pattern": {"q_proj": 2}}, "needs rank_pattern"),
        ({"r": 3}, "they must be"),
        ({"r": "x"}, "no readable LoRA adapter"),
    ],
    ids=["rslora", "bias", "pattern", "rank", "number"],
)
async def test_an_adapter_with_an_unsupported_config_is_refused(
    api: Api, folders: list[Path], tmp_path: Path, config: dict[str, object], says: str
) -> None:
    written = json.loads((folders[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | config))
    (tmp_path / "adapter_model.safetensors").write_bytes((folders[0] / "adapter_model.safetensors").read_bytes())
    assert says in await api.refused("/load_lora_adapter", {"lora_name": "wrong", "lora_path": str(tmp_path)})


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (".lora_A.", ".lora_C.", "is not half of a pair"),
        ("q_proj.lora_B", "q_proj.lora_X", "is not half of a pair"),
        ("layers.0", "layers.9", "the model has no linear layer"),
        ("base_model.model.", "", "the model has no linear layer"),
    ],
    ids=["other", "half", "layer", "prefix"],
)
async def test_tensors_that_are_not_the_models_are_refused(
    api: Api, folders: list[Path], tmp_path: Path, old: str, new: str, says: str
) -> None:
    tensors = load_file(folders[0] / "adapter_model.safetensors")
    save_file(
        {name.replace(old, new): tensor for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_bytes((folders[0] / "adapter_config.json").read_bytes())
    assert says in await api.refused("/load_lora_adapter", {"lora_name": "wrong", "lora_path": str(tmp_path)})
