"""Real vLLM servers that compute prompts and generate apart serve as one replica of a fleet."""

import asyncio
import importlib.util
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from transformers import AutoModelForCausalLM

from millrace.config.engines import PrefillDecodeConfig, VLLMEngineConfig
from millrace.config.sources import TinyModelConfig
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.engines.vllm.pair import PrefillDecodeEngine
from millrace.errors import EngineRefused
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.train.tiny import make_tiny_model
from millrace.types import GenerateRequest, Generation, Health, PauseMode, SamplingParams
from millrace.weights.source import NamedTensor
from tests.engines.processes import below, command_lines

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
TESTS, START_TIMEOUT, DEADLINE = Path(__file__).parents[1], 300.0, 60.0
PROMPTS = [tuple((7 * number + place) % 90 + 5 for place in range(100)) for number in range(6)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Two folders with other weights of the same shapes."""
    folders = [tmp_path_factory.mktemp("models") / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=64, heads=2, context_length=512), seed, folder)
    return folders


@pytest.fixture(scope="module")
def config(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> VLLMEngineConfig:
    nixl, found = tmp_path_factory.mktemp("nixl"), importlib.util.find_spec("nixl_cu12")
    assert found is not None
    assert found.origin is not None
    for name in ("nixl_cu12", "nixl_cu12.libs"):  # only these of this environment's packages
        (nixl / name).symlink_to(Path(found.origin).parents[1] / name)
    return VLLMEngineConfig(
        kind="vllm",
        device="cpu",
        python=vllm_python,
        start_timeout=START_TIMEOUT,
        # By TCP: between processes on the CPU, UCX's other ways wait for the other process too, and longer.
        env={"PYTHONPATH": f"{TESTS / 'vllm_nixl'}:{nixl}", "UCX_TLS": "tcp,self"},
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(
    config: VLLMEngineConfig, models: Sequence[Path], tmp_path_factory: pytest.TempPathFactory
) -> Sequence[Sequence[Generation]]:
    """What a lone server generates with the weights of each folder."""
    made = []
    async with open_fleet(config, models[0], log_dir=tmp_path_factory.mktemp("alone")) as fleet:
        for version, folder in enumerate(models):
            await fleet.publish(tensors(folder), version + 1)
            made.append(await generated(fleet))
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    config: VLLMEngineConfig,
    models: Sequence[Path],
    alone: Sequence[Sequence[Generation]],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Fleet]:
    pair = config.model_copy(update={"prefill_decode": PrefillDecodeConfig()})
    folder = tmp_path_factory.mktemp("versions")
    logs = tmp_path_factory.mktemp("logs")
    async with open_fleet(pair, models[0], log_dir=logs, folder=folder, restarts=2) as fleet:
        yield fleet


def tensors(folder: Path) -> list[NamedTensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def asking(prompt: tuple[int, ...], tokens: int = 12) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(tokens, temperature=0.0, ignore_eos=True))


async def generated(fleet: Fleet) -> list[Generation]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(fleet.generate(asking(prompt), deadline=DEADLINE)) for prompt in PROMPTS]
    return [task.result() for task in tasks]


def engine_of(fleet: Fleet) -> PrefillDecodeEngine:
    [engine] = fleet.engines.values()
    assert isinstance(engine, PrefillDecodeEngine)
    return engine


async def transferred(server: VLLMEngine) -> float:
    """How often this server has fetched the KV cache of a prompt."""
    lines = str(await server._ask("/metrics")).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:nixl_xfer_time_seconds_count"))


def require_same(made: Sequence[Generation], wanted: Sequence[Generation], version: int) -> None:
    for one, other in zip(made, wanted, strict=True):
        assert one.output_ids == other.output_ids
        assert abs(one.logprobs - other.logprobs).max() < 1e-4
        assert [span.version for span in one.version_spans] == [version]


async def test_it_generates_what_a_lone_server_does(fleet: Fleet, alone: Sequence[Sequence[Generation]]) -> None:
    [decode] = engine_of(fleet).decodes
    before = await transferred(decode)
    require_same(await generated(fleet), alone[0], 0)
    assert await transferred(decode) == before + len(PROMPTS)
    whole = GenerateRequest(PROMPTS[0], asking(PROMPTS[0]).sampling, prompt_logprobs=True)
    made = await fleet.generate(whole, deadline=DEADLINE)  # without a prefill server, which does not send them
    assert made.prompt_logprobs is not None
    require_same([made], alone[0][:1], 0)
    parts = [part async for part in engine_of(fleet).stream(asking(PROMPTS[1]), deadline=DEADLINE)]
    require_same(parts[-1:], alone[0][1:2], 0)
    short = [await fleet.generate(asking((5, 6, 7)), deadline=DEADLINE) for _ in range(2)]
    require_same(short[:1], short[1:], 0)


async def test_a_publish_reaches_both_sides(
    fleet: Fleet, models: Sequence[Path], alone: Sequence[Sequence[Generation]]
) -> None:
    engine = engine_of(fleet)
    for version, which in ((1, 1), (2, 0)):
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(fleet.generate(asking(prompt, 300), deadline=DEADLINE)) for prompt in PROMPTS]
            while not (await engine.loads()).running_requests:
                await asyncio.sleep(0.01)
            report = await fleet.publish(tensors(models[which]), version)
        assert not report.failed
        assert [(await server.info()).weight_version for server in engine.servers] == [version, version]
        for task in running:
            assert len(task.result().output_ids) == 300
            assert {span.version for span in task.result().version_spans} <= {version - 1, version}
        require_same(await generated(fleet), alone[which], version)


async def test_pause_and_sleep_reach_both_sides(
    fleet: Fleet, models: Sequence[Path], alone: Sequence[Sequence[Generation]]
) -> None:
    engine = engine_of(fleet)
    version = fleet.version
    assert version is not None
    task = asyncio.create_task(fleet.generate(asking(PROMPTS[0], 300), deadline=DEADLINE))
    while not (await engine.loads()).running_requests:
        await asyncio.sleep(0.01)
    with pytest.raises(EngineRefused, match="can't keep requests half-way on two servers"):
        await engine.pause(PauseMode.KEEP)
    await engine.pause(PauseMode.RETRACT)
    assert [(await server._ask("/is_paused"))["is_paused"] for server in engine.servers] == [True, True]
    assert await engine.health() is Health.PAUSED
    assert not task.done()
    await engine.resume()
    assert len((await task).output_ids) == 300
    await fleet.sleep()
    assert await engine.health() is Health.ASLEEP
    await fleet.wake()
    await fleet.publish(tensors(models[0]), version + 1)
    require_same(await generated(fleet), alone[0], version + 1)


async def test_it_comes_back_as_a_whole_when_a_prefill_server_dies(
    fleet: Fleet, alone: Sequence[Sequence[Generation]]
) -> None:
    version, port = fleet.version, engine_of(fleet).prefills[0].url.rpartition(":")[2]
    assert version is not None
    commands = {pid: command_lines({pid}) for pid in below(os.getpid())}
    # Not its guard, whose arguments are the server's too, and which ends the server's other processes.
    [server] = [pid for pid, line in commands.items() if f"--port={port}\0" in line and "guard.py" not in line]
    os.kill(server, signal.SIGKILL)
    async with asyncio.timeout(DEADLINE):
        while any(state.routable for state in fleet.snapshot.replicas):
            await asyncio.sleep(0.02)
    async with asyncio.timeout(START_TIMEOUT):
        while not all(state.routable for state in fleet.snapshot.replicas):
            await asyncio.sleep(0.1)
    [decode] = engine_of(fleet).decodes
    require_same(await generated(fleet), alone[0], version)
    assert await transferred(decode) == len(PROMPTS)
