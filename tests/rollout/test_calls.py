"""Functions of the user: each returns, raises or is late, and none of them holds anything else up."""

import asyncio
import contextvars
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable

import pytest

from millrace.rollout.calls import Calls, CallTimeout, Worker

NAME: contextvars.ContextVar[str] = contextvars.ContextVar("NAME")


def add(left: int, right: int) -> int:
    return left + right


async def add_later(left: int, right: int) -> int:
    await asyncio.sleep(0)
    return left + right


class Adder:
    async def __call__(self, left: int, right: int) -> int:
        return left + right


def add_soon(left: int, right: int) -> Awaitable[int]:
    return add_later(left, right)


@pytest.mark.parametrize("function", [add, add_later, Adder(), add_soon, lambda left, right: left + right])
async def test_sync_and_async_functions_return(function: Callable[..., object]) -> None:
    assert await Calls().run(function, {"left": 2, "right": 3}, deadline=30) == 5


async def test_a_sync_function_runs_in_a_thread_of_its_own_and_sees_the_callers_context() -> None:
    NAME.set("mine")

    def look() -> tuple[int, str]:
        return threading.get_ident(), NAME.get()

    thread, name = await Calls().run(look, deadline=30)
    assert thread != threading.get_ident()
    assert name == "mine"


async def test_a_worker_runs_everything_in_one_thread_in_order() -> None:
    worker, order = Worker("test"), []

    def note(number: int) -> int:
        order.append(number)
        return threading.get_ident()

    threads = await asyncio.gather(*(worker.run(lambda n=n: note(n)) for n in range(5)))  # type: ignore[misc]
    worker.end()
    assert len(set(threads)) == 1
    assert order == [0, 1, 2, 3, 4]


ERRORS = [ValueError("wrong"), TimeoutError("its own"), StopIteration(3), SystemExit(2), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_whatever_a_function_raises_reaches_the_caller_alone(error: BaseException) -> None:
    def fail() -> None:
        raise error

    async def fail_later() -> None:
        raise error

    calls = Calls()
    for function in (fail, fail_later):
        with pytest.raises(Exception, match=f"{type(error).__name__}|{error}") as raised:
            await calls.run(function, deadline=30)
        assert isinstance(raised.value, type(error) if isinstance(error, ValueError | TimeoutError) else RuntimeError)
    assert await calls.run(add, {"left": 1, "right": 1}, deadline=30) == 2


async def test_what_hangs_is_late_and_counted_until_it_returns(caplog: pytest.LogCaptureFixture) -> None:
    calls, done, ended = Calls(most=2), threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang() -> None:
        done.wait()
        loop.call_soon_threadsafe(ended.set)

    for number in (1, 2):
        with pytest.raises(CallTimeout, match=r"did not return within 0\.05 s"):
            await calls.run(hang, deadline=0.05)
        assert calls.stuck == number
    assert re.search(
        r"2 calls of rewards, tools or environments hang, the last of them in \S+hang; no more", caplog.text
    )
    with pytest.raises(CallTimeout, match="can't begin: 2 earlier calls hang"):
        await calls.run(add, {"left": 1, "right": 1}, deadline=30)
    done.set()
    async with asyncio.timeout(30):
        await ended.wait()
        while calls.stuck:
            await asyncio.sleep(0)
    assert await calls.run(add, {"left": 1, "right": 1}, deadline=30) == 2


async def test_a_call_waits_for_a_free_thread_within_its_deadline() -> None:
    calls, done = Calls(most=1), threading.Event()
    first = asyncio.create_task(calls.run(done.wait, deadline=60))
    await asyncio.sleep(0)
    with pytest.raises(CallTimeout, match=r"did not begin within 0\.05 s, because 1 other calls were running"):
        await calls.run(add, {"left": 1, "right": 1}, deadline=0.05)
    second = asyncio.create_task(calls.run(add, {"left": 1, "right": 1}, deadline=60))
    done.set()
    assert list(await asyncio.gather(first, second)) == [True, 2]


async def test_an_async_function_is_cancelled_when_it_is_late_or_its_caller_is_cancelled() -> None:
    ends: list[str] = []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    with pytest.raises(CallTimeout, match=r"did not return within 0\.05 s"):
        await Calls().run(hang, deadline=0.05)
    task = asyncio.create_task(Calls().run(hang, deadline=60))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ends == ["cancelled"] * 2


HANG = """
import asyncio, threading
from millrace.rollout.calls import Calls, CallTimeout

async def main():
    try:
        await Calls().run(threading.Event().wait, deadline=0.01)
    except CallTimeout as error:
        print(error)

asyncio.run(main())
"""


def test_a_function_that_hangs_does_not_keep_the_process_from_ending() -> None:
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("it did not return within 0.01 s\n", "")
