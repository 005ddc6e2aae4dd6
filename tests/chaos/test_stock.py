"""A short list of faults on real SGLang and vLLM servers, each in the middle of rollouts. The model's folder is in
bfloat16 except for one norm, and the trainer is in float32."""

import asyncio
import os
import random
import signal
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.config.engines import SGLangEngineConfig, VLLMEngineConfig
from millrace.fleet.event_log import Outcome
from millrace.fleet.local import open_fleet
from millrace.model_folder import stored_tensors
from millrace.rollout.problems import generate_problems
from millrace.rollout.scheduler import RolloutScheduler
from millrace.types import SamplingParams
from millrace.weights.chain import folder_name
from tests.chaos.faults import WAIT, Run, check, give_everything_up, hit, kill, publish, stop_and_go_on, until_all_serve
from tests.conformance.run_checks import START_TIMEOUT
from tests.dtypes import save_as
from tests.engines.processes import below, command_lines
from tests.rollout.test_scheduler import make_runner

NORM = "model.norm.weight"
GROUPS, SAMPLES = 12, 4  # of each round
AT_A_TIME = 8  # requests that an engine runs at a time; the others wait in its queue
PROBLEMS = list(generate_problems(7, GROUPS))


@pytest.mark.slow
async def test_sglang_comes_back_and_nothing_is_lost(
    sglang_python: Callable[[str], Path], tiny_model: Path, tmp_path: Path
) -> None:
    version = "0.5.23"
    await play(
        SGLangEngineConfig(
            kind="sglang",
            device="cpu",
            replicas=2,
            threads=1,
            version=version,
            python=sglang_python(version),
            max_running_requests=AT_A_TIME,
            start_timeout=START_TIMEOUT,
            kv_events=True,
        ),
        tiny_model,
        tmp_path,
        folder=tmp_path / "versions",
    )


@pytest.mark.slow
async def test_vllm_comes_back_without_a_store_and_nothing_is_lost(
    vllm_python: Path, tiny_model: Path, tmp_path: Path
) -> None:
    await play(
        VLLMEngineConfig(
            kind="vllm",
            device="cpu",
            replicas=2,
            threads=1,
            python=vllm_python,
            max_running_requests=AT_A_TIME,
            start_timeout=START_TIMEOUT,
            kv_events=True,
        ),
        tiny_model,
        tmp_path,
    )


async def play(
    config: SGLangEngineConfig | VLLMEngineConfig, model_path: Path, place: Path, folder: Path | None = None
) -> None:
    """Plays rounds with faults. `folder` keeps the versions. Without it, an engine that comes back gets them from the
    trainer."""
    before = below(os.getpid())
    model_path = save_as(model_path, place / "model", torch.bfloat16, unusual={NORM: torch.float32})
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    async with open_fleet(config, model_path, log_dir=place, folder=folder, restarts=5) as fleet:
        infos = [await engine.info() for engine in fleet.engines.values()]
        assert {info.dtype for info in infos} == {"bfloat16"}
        run = Run(fleet, random.Random(0), tensors)
        one, two = fleet.engines
        # SGLang refuses ignore_eos together with the stop tokens of a chat.
        runner = replace(make_runner(fleet, model_path), sampling=SamplingParams(24), timeout=2 * WAIT)
        async with RolloutScheduler(runner, SAMPLES) as scheduler:
            await in_the_middle(run, scheduler, two, partial(stop_and_go_on, run, two), partial(publish, run, 1))
            await in_the_middle(
                run, scheduler, one, *(partial(give_everything_up, run, name) for name in fleet.engines)
            )
            await in_the_middle(run, scheduler, two, partial(publish, run, 2, lambda: hit(run, two, signal.SIGKILL)))
            assert fleet.snapshot.get(one).version == 2
            await in_the_middle(run, scheduler, one, partial(kill, run, one))  # engine two is still on its way back
            await until_all_serve(run, 2)
        if folder is not None:
            stored = stored_tensors(folder / folder_name(2))
            assert {tensor.float_dtype for name, tensor in stored.items() if name != NORM} == {"bfloat16"}
            assert stored[NORM].float_dtype == "float32"
        assert all(name in fleet._router._cached for name in fleet.engines)  # the new engines report their events too
        sockets = {(replica.kv_events or "").rpartition("/")[2] for replica in fleet.replicas.by_name.values()}
        metrics = fleet.event_log.metrics
        assert {name: metrics.restarts[name, True] for name in fleet.engines} == {one: 1, two: 1}
        assert metrics.retries[True] > 0, "nothing hit any sample"
        print(f"{scheduler.counts}; {metrics.retries.total()} retries")
    assert len(sockets) == 2
    assert not sockets & {*os.listdir("/dev/shm")}
    left = {pid: command_lines({pid}) for pid in below(os.getpid()) - before}
    # Torch's own process lives as long as this one.
    assert all("torch_shm_manager" in line for line in left.values()), left


async def in_the_middle(
    run: Run, scheduler: RolloutScheduler, name: str, *happens: Callable[[], Coroutine[object, object, None]]
) -> None:
    """Runs one round of rollouts. All of `happens` run at once when the engine `name` has ended the first of its
    requests and has others. On a busy machine it may end all of them before that is noticed. Then another round
    follows."""
    metrics, busy = run.fleet.event_log.metrics, False
    async with asyncio.timeout(4 * WAIT):
        while not busy:
            asked, ended = scheduler.counts.asked, metrics.requests[name, Outcome.FINISHED]
            scheduler.start(((f"{asked}+{i}", problem) for i, problem in enumerate(PROBLEMS)), version=0)
            while (
                metrics.requests[name, Outcome.FINISHED] == ended
                and scheduler.counts.ended.total() < scheduler.counts.asked
            ):
                await asyncio.sleep(0.01)
            busy = run.fleet.outstanding[name] > 0
            if busy:
                await asyncio.gather(*(happen() for happen in happens))
            groups = [await scheduler.next_group() for _ in PROBLEMS]
            samples = [sample for group in groups for sample in group.samples]
            check(run, samples, (f"{asked}+{i}-{j}" for i in range(GROUPS) for j in range(SAMPLES)))
            assert scheduler.counts.ended.total() == scheduler.counts.asked
