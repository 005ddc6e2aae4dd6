"""What holds for a replica that computes prompts and generates on different servers, on any device."""

import asyncio
import importlib.util
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.config.sources import TinyModelConfig
from millrace.engines.stock.interpreter import StockConfig
from millrace.engines.stock.pair import PrefillDecodeEngine
from millrace.errors import EngineError, EngineRefused
from millrace.fleet.client import FleetClient
from millrace.fleet.fleet import Fleet
from millrace.fleet.local import open_fleet
from millrace.train.tiny import make_tiny_model
from millrace.types import GenerateRequest, Generation, Health, PauseMode, SamplingParams
from millrace.weights.source import NamedTensor
from tests.engines.processes import below, command_lines

TESTS, START_TIMEOUT, DEADLINE = Path(__file__).parents[1], 300.0, 60.0
PROMPTS = [tuple((7 * number + place * place) % 90 + 5 for place in range(100)) for number in range(6)]
TOKENS = 12
ENDLESS = 3500  # tokens; of a request that does not end by itself before it is aborted
# The weights are multiplied, so that logprobs depend on the prompt by far more (5) than on bfloat16 (0.06).
SHARPER = 10.0
Made = Sequence[Generation]


@dataclass(frozen=True)
class Bounds:
    """How far the pair's output may be from a lone server's, and how fast it may be.

    alike: the share of equal tokens. Of each prompt, those before the first other one count. logprobs: of these. long:
    the tokens of an output that is not finished while the test makes a few calls.
    """

    alike: float = 1.0
    logprobs: float = 1e-4
    long: int = 300


def make_models(folder: Path) -> Sequence[Path]:
    """Make two folders with other weights of the same shapes."""
    folders = [folder / str(seed) for seed in range(2)]
    for seed, one in enumerate(folders):
        make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=64, heads=2, context_length=4096), seed, one)
        model = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(SHARPER)
        model.save_pretrained(one)
    return folders


def on_cpu(config: StockConfig, folder: Path) -> StockConfig:
    """Return the settings with which the engine transfers KV cache without a GPU. See `tests/nixl_cpu`."""
    found = importlib.util.find_spec("nixl_cu12")
    assert found is not None
    assert found.origin is not None
    for name in ("nixl_cu12", "nixl_cu12.libs"):  # only these of this environment's packages
        (folder / name).symlink_to(Path(found.origin).parents[1] / name)
    # By TCP: between processes on the CPU, UCX's other ways wait for the other process too, and longer.
    env = {"PYTHONPATH": f"{TESTS / 'nixl_cpu'}:{folder}", "UCX_TLS": "tcp,self", **config.env}
    arguments = dict(config.engine_args)
    if isinstance(config, SGLangEngineConfig):  # otherwise a decode server pins host memory
        arguments["disaggregation_decode_retraction_backup"] = "cpu_tensor"
    return config.model_copy(update={"env": env, "engine_args": arguments})


def config_on_cpu(request: pytest.FixtureRequest, folder: Path) -> StockConfig:
    """Return the settings of a lone server on the CPU. The fixture's parameter is the engine's kind."""
    common: dict[str, Any] = {"device": "cpu", "threads": 1, "start_timeout": START_TIMEOUT}
    plain: StockConfig
    if request.param == "sglang":
        python = request.getfixturevalue("sglang_python")("0.5.23")
        plain = SGLangEngineConfig(kind="sglang", python=python, **common)
    else:
        plain = VLLMEngineConfig(kind="vllm", python=request.getfixturevalue("vllm_python"), **common)
    return on_cpu(plain, folder)


def tensors(folder: Path) -> list[NamedTensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def asking(prompt: tuple[int, ...], tokens: int = TOKENS) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(tokens, temperature=0.0, ignore_eos=True))


async def generated(fleet: FleetClient) -> list[Generation]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(fleet.generate(asking(prompt), deadline=DEADLINE)) for prompt in PROMPTS]
    return [task.result() for task in tasks]


async def generated_alone(config: StockConfig, models: Sequence[Path], logs: Path) -> Sequence[Made]:
    """Return what a lone server generates with the weights of each folder."""
    made = []
    async with open_fleet(config, models[0], log_dir=logs) as fleet:
        for version, folder in enumerate(models):
            await fleet.publish(tensors(folder), version + 1)
            made.append(await generated(fleet))
    assert not any(one.output_ids == other.output_ids for one, other in zip(*made, strict=True))
    return made


def engine_of(fleet: Fleet) -> PrefillDecodeEngine:
    [engine] = fleet.engines.values()
    assert isinstance(engine, PrefillDecodeEngine)
    return engine


def require_same(made: Made, wanted: Made, version: int, bounds: Bounds) -> None:
    alike = 0
    for one, other in zip(made, wanted, strict=True):
        assert len(one.output_ids) == len(other.output_ids)
        assert [span.version for span in one.version_spans] == [version]
        pairs = zip(one.output_ids, other.output_ids, strict=True)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(one.output_ids))
        assert abs(one.logprobs[:same] - other.logprobs[:same]).max(initial=0.0) < bounds.logprobs
        alike += same
    assert alike >= bounds.alike * sum(len(one.output_ids) for one in wanted)


async def busy(engine: PrefillDecodeEngine, requests: int = 1) -> None:
    """Wait until the engine runs so many requests."""
    async with asyncio.timeout(DEADLINE):
        while (await engine.loads()).running_requests < requests:
            await asyncio.sleep(0.01)


async def check_generates_as_a_lone_server(fleet: Fleet, alone: Sequence[Made], bounds: Bounds) -> None:
    require_same(await generated(fleet), alone[0], 0, bounds)
    whole = GenerateRequest(PROMPTS[0], asking(PROMPTS[0]).sampling, prompt_logprobs=True)
    made = await fleet.generate(whole, deadline=DEADLINE)
    assert made.prompt_logprobs is not None
    assert len(made.prompt_logprobs) == len(PROMPTS[0])
    *some, part = [part async for part in engine_of(fleet).stream(asking(PROMPTS[1]), deadline=DEADLINE)]
    assert some
    short, again = [await fleet.generate(asking((5, 6, 7)), deadline=DEADLINE) for _ in range(2)]
    require_same([made, part, short], [*alone[0][:2], again], 0, bounds)
    one = await fleet.generate(asking(PROMPTS[2], 1), deadline=DEADLINE)
    assert len(one.output_ids) == 1


async def check_publish(fleet: Fleet, models: Sequence[Path], alone: Sequence[Made], bounds: Bounds) -> None:
    """A publish reaches both sides, also while requests are in flight, whose versions are truthful."""
    engine, long = engine_of(fleet), bounds.long
    for which in (1, 0):
        version = (fleet.version or 0) + 1
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(fleet.generate(asking(prompt, long), deadline=DEADLINE)) for prompt in PROMPTS]
            await busy(engine)
            report = await fleet.publish(tensors(models[which]), version)
        assert not report.failed
        assert {(await server.info()).weight_version for server in engine.servers} == {version}
        for task in running:
            assert len(task.result().output_ids) == long
            assert {span.version for span in task.result().version_spans} <= {version - 1, version}
        require_same(await generated(fleet), alone[which], version, bounds)


async def check_pause_and_abort(fleet: Fleet, bounds: Bounds) -> None:
    """A pause reaches both sides, and the requests go on afterwards. An abort ends both halves of a request."""
    engine, long = engine_of(fleet), bounds.long
    task = asyncio.create_task(fleet.generate(asking(PROMPTS[0], long), deadline=DEADLINE))
    await busy(engine)
    with pytest.raises(EngineRefused, match="can't keep requests half-way on two servers"):
        await engine.pause(PauseMode.KEEP)
    await engine.pause(PauseMode.RETRACT)
    assert await engine.health() is Health.PAUSED
    assert [await server.health() for server in engine.servers] == [Health.PAUSED] * len(engine.servers)
    assert not task.done()
    await engine.resume()
    assert len((await task).output_ids) == long
    requests = [asking(prompt, ENDLESS) for prompt in PROMPTS]
    tasks = [asyncio.create_task(engine.generate(one, deadline=DEADLINE)) for one in requests]
    await busy(engine)
    for one in requests[::2]:
        await engine.abort(one.request_id)
    await engine.abort()
    assert {(await task).finish_reason for task in tasks} == {"abort"}
    await engine.flush_cache()  # so nothing is left on either side


async def check_recovery(fleet: Fleet, alone: Made, bounds: Bounds) -> None:
    """When a prefill server dies, its requests fail at once, and the replica is out until it is back as a whole."""
    version, engine = fleet.version, engine_of(fleet)
    assert version is not None
    port = engine.prefills[0].url.rpartition(":")[2]
    commands = {pid: command_lines({pid}) for pid in below(os.getpid())}
    # Not its guard, whose arguments are the server's too, and which ends the server's other processes.
    [server] = [pid for pid, line in commands.items() if f"--port={port}\0" in line and "guard.py" not in line]
    os.kill(server, signal.SIGSTOP)  # so that a request is half-way when it dies
    half_way = asyncio.create_task(engine.generate(asking(PROMPTS[0]), deadline=4 * DEADLINE))
    await asyncio.sleep(0)
    os.kill(server, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError):
        await half_way
    assert time.monotonic() - began < DEADLINE
    async with asyncio.timeout(DEADLINE):
        while any(state.routable for state in fleet.snapshot.replicas):
            await asyncio.sleep(0.02)
    async with asyncio.timeout(START_TIMEOUT):
        while not all(state.routable for state in fleet.snapshot.replicas):
            await asyncio.sleep(0.1)
    require_same(await generated(fleet), alone, version, bounds)
