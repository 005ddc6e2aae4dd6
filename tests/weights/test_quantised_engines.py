"""Real engines with quantised weights: what a publish brings them, and what the audit finds.

SGLang computes quantised layers by `tests/sglang_kernels`. vLLM computes fp8 in blocks (on CPUs without AMX), MXFP8 and
NVFP4 by `tests/vllm_kernels`, and the other forms by its own kernels.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.engines.http_engine import HttpEngine
from millrace.engines.start import ADMIN_KEY, API_KEY
from millrace.errors import PublishError
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.model_config import read_quantization
from millrace.model_folder import stored_tensors
from millrace.quantisation import LayerForm
from millrace.weights.audit import EngineAudit, Samples
from millrace.weights.publisher import Publish
from millrace.weights.quantised import as_in_folder
from millrace.weights.source import NamedTensor, source_of
from millrace.weights.transports.base import PublishTarget, TransportContext
from millrace.weights.transports.registry import create
from tests.quantised_models import QUANTISED, make_dense_folder, make_moe, save_quantised

START_TIMEOUT = 600.0
SGLANG_KERNELS, VLLM_KERNELS = (Path(__file__).parents[1] / name for name in ("sglang_kernels", "vllm_kernels"))
BLOCK = LayerForm("float8_e4m3fn", 8, (128, 128))
PLAIN = LayerForm("bfloat16", 16, None)

no_scaled_fp8_quant = pytest.mark.skip(
    reason="vLLM gives fused layers one scale by _C::static_scaled_fp8_quant, of which its build for CPUs has a stub"
)
no_marlin = pytest.mark.skip(reason="vLLM computes NVFP4 without scales of activations only by Marlin, a GPU kernel")


def sglang(python: Path, **engine_args: str) -> SGLangEngineConfig:
    return SGLangEngineConfig(
        kind="sglang",
        device="cpu",
        python=python,
        threads=1,
        start_timeout=START_TIMEOUT,
        env={"PYTHONPATH": str(SGLANG_KERNELS)},
        engine_args=dict(engine_args),
    )


def vllm(python: Path, urls: tuple[str, ...] | None = None, **engine_args: str) -> VLLMEngineConfig:
    own = {"urls": urls} if urls is not None else {"python": python}
    return VLLMEngineConfig(
        kind="vllm",
        device="cpu",
        threads=1,
        start_timeout=START_TIMEOUT,
        # vLLM's emulation of MXFP8 would otherwise hold the weights in bfloat16.
        env={"PYTHONPATH": str(VLLM_KERNELS), "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD": "0"},
        engine_args=dict(engine_args),
        **own,
    )


async def audited_publish(fleet: Fleet, model: PreTrainedModel, version: int) -> EngineAudit:
    report = await fleet.publish(list(model.named_parameters()), version, deadline=START_TIMEOUT)
    [engine] = report.engines
    assert engine.audit is not None
    assert engine.audit.unaudited == ()
    return engine.audit


def require_sound(audit: EngineAudit, form: LayerForm, most: float) -> None:
    """The decoder's linear layers have this form and a plausible error; all others are as they were."""
    assert audit.faults() == []
    for layer in audit.layers:
        linear = QUANTISED.search(layer.tensor.replace("_packed", "")) is not None
        assert layer.form == (form if linear else PLAIN), layer
        assert layer.error is not None, layer
        assert (0.001 < layer.error < most) if linear else layer.error == 0, layer


def target_of(fleet: Fleet) -> PublishTarget:
    [replica] = fleet.replicas.by_name.values()
    return PublishTarget(replica.engine, replica.info)


async def publish_with_wrong_scales(target: PublishTarget, folder: Path, model: PreTrainedModel, factor: float) -> None:
    """Publishes as a fleet does, but some scales are wrong by a factor."""
    samples = Samples(9)

    def wrong(tensors: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
        for name, tensor in tensors:
            yield name, tensor * factor if name.endswith("1.mlp.down_proj.weight_scale_inv") else tensor

    tensors = source_of(list(model.state_dict().items()))
    source = as_in_folder(tensors, stored_tensors(folder), read_quantization(folder), samples)
    transport = create("shm", TransportContext(capabilities=target.info.capabilities, here=True))
    publish = Publish(
        [target], source.converted(wrong), 9, transport, bucket_bytes=2**22, deadline=START_TIMEOUT, samples=samples
    )
    try:
        await publish.run()
    finally:
        await transport.close()


async def check_vllm(
    make: Callable[[Path, int], PreTrainedModel], form: str, held: LayerForm, error: float, python: Path, place: Path
) -> None:
    """Starts vLLM from a folder in this form, and does `check_both`. make: makes a model in a folder, from a seed."""
    first, second = (make(place / str(seed), seed) for seed in range(2))
    folder = save_quantised(place / "1", place / "quantised", form)
    async with open_fleet(vllm(python), folder, log_dir=place / "logs") as fleet:
        await check_both(fleet, first, second, held, error)


async def check_both(
    fleet: Fleet, first: PreTrainedModel, second: PreTrainedModel, held: LayerForm, error: float
) -> None:
    """Publishes other weights and then the engine's own. The audits are sound, and it then holds the bytes that it was
    started with."""
    engine = target_of(fleet).engine
    own = await engine.checksums()
    require_sound(await audited_publish(fleet, first, 1), held, error)
    require_sound(await audited_publish(fleet, second, 2), held, error)
    assert await engine.checksums() == own


@pytest.mark.slow
async def test_sglang_gets_fp8_in_blocks(sglang_python: Callable[[str], Path], tmp_path: Path) -> None:
    """It holds the same bytes as a server that was started from a folder with these weights, and a layer with wrong
    scales is found before it serves."""
    first, second = (make_dense_folder(tmp_path / str(seed), seed) for seed in range(2))
    folder = save_quantised(tmp_path / "1", tmp_path / "fp8", "fp8_block")
    async with open_fleet(sglang(sglang_python("0.5.23")), folder, log_dir=tmp_path / "logs") as fleet:
        target = target_of(fleet)
        own = await target.engine.checksums()
        require_sound(await audited_publish(fleet, first, 1), BLOCK, 0.04)
        assert await target.engine.checksums() != own
        require_sound(await audited_publish(fleet, second, 2), BLOCK, 0.04)
        assert await target.engine.checksums() == own
        with pytest.raises(
            PublishError, match=r"its layer model.layers.1.mlp.down_proj, in float8_e4m3fn .* is 0\.[45]"
        ):
            await publish_with_wrong_scales(target, folder, second, 1.5)


@pytest.mark.slow
async def test_sglang_gets_experts_in_fp8(sglang_python: Callable[[str], Path], tmp_path: Path) -> None:
    first, second = (make_moe(tmp_path / str(seed), seed) for seed in range(2))
    folder = save_quantised(tmp_path / "1", tmp_path / "fp8", "fp8_block")
    async with open_fleet(sglang(sglang_python("0.5.23")), folder, log_dir=tmp_path / "logs") as fleet:
        await check_both(fleet, first, second, BLOCK, 0.04)


@pytest.mark.slow
async def test_sglang_quantises_by_itself(sglang_python: Callable[[str], Path], tmp_path: Path) -> None:
    """With `flash_rl`, which goes by a broadcast here. The audit finds where SGLang's own loader put the weights."""
    first, second = (make_dense_folder(tmp_path / str(seed), seed) for seed in range(2))
    config = sglang(sglang_python("0.5.23"), quantization="fp8", load_format="flash_rl")
    async with open_fleet(config, tmp_path / "0", log_dir=tmp_path / "logs", transport="gloo") as fleet:
        for version, model in enumerate((second, first), 1):
            audit = await audited_publish(fleet, model, version)
            require_sound(audit, LayerForm("float8_e4m3fn", 8, (-1, -1)), 0.04)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "held", "error"),
    [
        ("fp8_block", BLOCK, 0.04),
        ("fp8_channel", LayerForm("float8_e4m3fn", 8, (1, -1)), 0.04),
        pytest.param("fp8_tensor", LayerForm("float8_e4m3fn", 8, (-1, -1)), 0.04, marks=no_scaled_fp8_quant),
        ("int8", LayerForm("int8", 8, (1, -1)), 0.02),
        ("int4", LayerForm("int32", 4, (1, 128)), 0.15),
        ("mxfp8", LayerForm("float8_e4m3fn", 8, (1, 32)), 0.04),
        ("modelopt_mxfp8", LayerForm("float8_e4m3fn", 8, (1, 32)), 0.04),
        ("nvfp4", LayerForm("uint8", 4, (1, 16)), 0.15),
        ("modelopt_nvfp4", LayerForm("uint8", 4, (1, 16)), 0.15),
        pytest.param("nvfp4a16", LayerForm("uint8", 4, (1, 16)), 0.15, marks=no_marlin),
    ],
)
async def test_vllm_gets_quantised_weights(
    form: str, held: LayerForm, error: float, vllm_python: Path, tmp_path: Path
) -> None:
    await check_vllm(make_dense_folder, form, held, error, vllm_python, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "held", "error"),
    [
        ("mxfp8", LayerForm("float8_e4m3fn", 8, (1, 32)), 0.04),
        ("nvfp4", LayerForm("uint8", 4, (1, 16)), 0.15),
        ("modelopt_nvfp4", LayerForm("uint8", 4, (1, 16)), 0.15),
    ],
)
async def test_vllm_gets_quantised_experts(
    form: str, held: LayerForm, error: float, vllm_python: Path, tmp_path: Path
) -> None:
    """Its kernels for experts in the other forms need a CPU with AMX."""
    await check_vllm(make_moe, form, held, error, vllm_python, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "held"),
    [("fp8_per_block", BLOCK), ("fp8_per_channel", LayerForm("float8_e4m3fn", 8, (1, -1)))],
)
async def test_vllm_quantises_by_itself(option: str, held: LayerForm, vllm_python: Path, tmp_path: Path) -> None:
    first, second = (make_dense_folder(tmp_path / str(seed), seed) for seed in range(2))
    config = vllm(vllm_python, quantization=option)
    async with open_fleet(config, tmp_path / "1", log_dir=tmp_path / "logs") as fleet:
        await check_both(fleet, first, second, held, 0.04)


@pytest.mark.slow
async def test_a_server_that_does_not_quantise_although_it_should_is_found(
    vllm_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config asks for fp8, and the server at the URL was started without it."""
    model = make_dense_folder(tmp_path / "model")
    async with open_fleet(vllm(vllm_python), tmp_path / "model", log_dir=tmp_path / "logs") as served:
        engine = target_of(served).engine
        assert isinstance(engine, HttpEngine)
        monkeypatch.setenv(API_KEY, str(engine.api_key))
        monkeypatch.setenv(ADMIN_KEY, str(engine.admin_key))
        attached = vllm(vllm_python, urls=(engine.url,), quantization="fp8_per_block")
        async with open_fleet(attached, tmp_path / "model", log_dir=tmp_path / "logs") as fleet:
            with pytest.raises(PublishError, match=r"is bfloat16, and fp8_per_block .* was asked for \(and 7 more"):
                await fleet.publish(list(model.named_parameters()), 1, deadline=START_TIMEOUT)
