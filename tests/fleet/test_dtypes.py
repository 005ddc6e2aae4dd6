"""Real embedded engines in bfloat16 and float16, and a trainer in float32."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from millrace.checksum import tensor_checksum
from millrace.config import EmbeddedEngineConfig
from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.types import ALL_MEMORY, GenerateRequest, SamplingParams, VersionSpan
from millrace.weights.store import VersionStore
from tests.dtypes import save_as
from tests.engines.embedded.test_models import COMMON, EXPERTS, LATENT

NORM = "model.norm.weight"
Tensors = list[tuple[str, torch.Tensor]]


def config(**settings: Any) -> EmbeddedEngineConfig:
    return EmbeddedEngineConfig(kind="embedded", threads=1, max_running_requests=4, cached_prefixes=2, **settings)


@pytest.fixture(scope="module")
def tensors(tiny_model: Path) -> Tensors:
    """The tensors of a trainer: float32, with values that half of the bits could not hold."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return [(name, parameter.detach() * (1 + 1e-4)) for name, parameter in model.named_parameters()]


async def require_holds(fleet: Fleet, tensors: Tensors, dtype: torch.dtype, version: int) -> None:
    [engine] = fleet.engines.values()
    assert {name: tensor_checksum(tensor.to(dtype)) for name, tensor in tensors} == await engine.checksums()
    request = GenerateRequest(
        (5, 17, 42), SamplingParams(4, temperature=0.0, ignore_eos=True), request_id=f"r{version}"
    )
    made = await fleet.generate(request, deadline=30)
    assert made.version_spans == (VersionSpan(version, 0, 4),)


@pytest.mark.parametrize(("dtype", "key"), [(torch.bfloat16, "torch_dtype"), (torch.float16, "dtype")])
async def test_a_half_precision_folder_is_served_published_to_and_kept(
    tiny_model: Path, tensors: Tensors, tmp_path: Path, dtype: torch.dtype, key: str
) -> None:
    folder = save_as(tiny_model, tmp_path / "m", dtype, key=key)
    own = list(load_file(folder / "model.safetensors").items())
    loud = [(name, torch.full_like(tensor, 1e6) if name == NORM else tensor) for name, tensor in tensors]
    async with open_fleet(config(), folder, log_dir=tmp_path, folder=tmp_path / "store") as fleet:
        await require_holds(fleet, own, dtype, 0)
        report = await fleet.publish(tensors, 1)
        assert report.nbytes == sum(tensor.numel() * 2 for _, tensor in tensors)
        await require_holds(fleet, tensors, dtype, 1)
        if dtype is torch.float16:  # float16 can't hold 1e6
            with pytest.raises(PublishError, match=NORM):
                await fleet.publish(loud, 2)
        await fleet.sleep(ALL_MEMORY)
        await fleet.wake(ALL_MEMORY)
        await fleet.publish(tensors, 2)
        [name] = fleet.engines
        await fleet.restart(name)  # the engine catches up from the store
        await require_holds(fleet, tensors, dtype, 2)
    store = VersionStore(str(tmp_path / "store"), folder, keep=2)
    assert {tensor.dtype for _, tensor in store.tensors(2)} == {dtype}
    store.close()


@pytest.mark.parametrize("transport", ["gloo", "delta"])
async def test_every_transport_sends_the_cast_tensors(
    tiny_model: Path, tensors: Tensors, tmp_path: Path, transport: Any
) -> None:
    folder = save_as(tiny_model, tmp_path / "m", torch.bfloat16)
    store = None if transport == "gloo" else tmp_path / "store"
    async with open_fleet(config(), folder, log_dir=tmp_path, transport=transport, folder=store) as fleet:
        for version in (1, 2):
            await fleet.publish([(name, tensor * version) for name, tensor in tensors], version)
        await require_holds(fleet, [(name, tensor * 2) for name, tensor in tensors], torch.bfloat16, 2)


async def test_a_dtype_that_is_not_the_folders(tiny_model: Path, tmp_path: Path) -> None:
    """The engine casts the folder at its start, and again when it wakes. The checksums that it is compared with are
    cast too."""
    own = list(load_file(tiny_model / "model.safetensors").items())
    settings = config(dtype="bfloat16", context_length=64)
    async with open_fleet(settings, tiny_model, log_dir=tmp_path, frozen=True) as fleet:
        assert fleet.context_length == 64
        await require_holds(fleet, own, torch.bfloat16, 0)
        await fleet.sleep()
        await fleet.restore()
        await require_holds(fleet, own, torch.bfloat16, 0)


async def test_a_tensor_that_the_folder_keeps_in_another_dtype(
    tiny_model: Path, tensors: Tensors, tmp_path: Path
) -> None:
    """transformers casts the tensor to the model's dtype. The engine reports that dtype and is sent it."""
    folder = save_as(tiny_model, tmp_path / "m", torch.bfloat16, unusual={NORM: torch.float32})
    async with open_fleet(config(), folder, log_dir=tmp_path) as fleet:
        await require_holds(fleet, list(load_file(folder / "model.safetensors").items()), torch.bfloat16, 0)
        await fleet.publish(tensors, 1)
        await require_holds(fleet, tensors, torch.bfloat16, 1)


async def test_a_tensor_that_the_model_keeps_in_float32(tmp_path: Path) -> None:
    """transformers keeps a router's correction bias in float32 in a model of bfloat16."""
    shape = {**COMMON, **LATENT, **EXPERTS, "num_key_value_heads": 4, "first_k_dense_replace": 2}
    shape |= {"num_hidden_layers": 3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **shape)).bfloat16()
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    state = model.state_dict()
    state[bias] = torch.rand(state[bias].shape)  # float32
    await asyncio.to_thread(model.save_pretrained, tmp_path / "m", state_dict=state)
    async with open_fleet(config(), tmp_path / "m", log_dir=tmp_path) as fleet:
        [engine] = fleet.engines.values()
        assert (await engine.info()).unusual_dtypes == {bias: "float32"}
        trained = {name: tensor.float() * (1 + 1e-4) for name, tensor in state.items()}
        await fleet.publish(trained.items(), 1)
        held = await engine.checksums()
        assert held[bias] == tensor_checksum(trained[bias])
        assert held["model.norm.weight"] == tensor_checksum(trained["model.norm.weight"].bfloat16())
