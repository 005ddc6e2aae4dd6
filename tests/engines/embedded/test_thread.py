"""When the model thread dies, its callers get an error."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.engines.embedded.build import build
from millrace.engines.embedded.core import Core, Refused
from millrace.engines.embedded.protocol import GenerateBody, to_requests
from millrace.engines.embedded.thread import ModelThread
from millrace.errors import DataError
from tests.engines.embedded.test_models import settings


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name == "model":
            thread.join(10)
            assert not thread.is_alive()


async def start(folder: Path) -> tuple[ModelThread, asyncio.Event]:
    ended = asyncio.Event()
    thread = ModelThread(
        lambda: build(settings(folder)),
        asyncio.get_running_loop(),
        deliver=lambda outputs: None,
        ended=ended.set,
    )
    thread.start()
    await asyncio.wait([thread.ready])
    return thread, ended


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_step_that_raises_ends_the_thread_and_every_wait(model_dir: Path) -> None:
    thread, ended = await start(model_dir)
    info = thread.ready.result().info

    def sabotage(core: Core) -> None:
        core.weights.release()  # without the core's knowledge, so the next step finds empty tensors
        core.submit(to_requests(GenerateBody(input_ids=[1]), info, 0))

    thread.post(sabotage)
    with pytest.raises(Refused, match="ended"):
        for _ in range(1000):  # one of these calls is queued when the step fails
            await thread.call(Core.status, deadline=10)
            await asyncio.sleep(0)
            if ended.is_set():
                raise Refused("ended")
    await asyncio.wait_for(ended.wait(), 10)
    assert not thread.alive


async def test_an_error_of_a_command_reaches_its_caller_and_no_other(model_dir: Path) -> None:
    thread, ended = await start(model_dir)

    def fail(core: Core) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await thread.call(fail)
    assert (await thread.call(Core.status)).running == 0
    assert not ended.is_set()
    thread.stop()
    await asyncio.wait_for(ended.wait(), 10)


async def test_a_model_that_can_not_be_loaded(tmp_path: Path) -> None:
    thread, _ = await start(tmp_path)
    assert isinstance(thread.ready.exception(), DataError)
