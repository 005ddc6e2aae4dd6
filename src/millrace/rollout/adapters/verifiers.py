"""Environments of the library verifiers: its harnesses play, and the samples of a run are the model that they ask.

verifiers runs an episode and asks a chat endpoint for each turn. The endpoint is in Millrace's own process. It hands a
request to the sample that plays the episode, and answers it with the next turn of that sample.
"""

import asyncio
import hmac
import secrets
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aiohttp import web

from millrace.config.tasks import EnvironmentConfig
from millrace.errors import ConfigError, UserCodeError
from millrace.http.replies import reply
from millrace.http.serving import serving
from millrace.imports import needs_extra
from millrace.rollout.adapters.chat_requests import CONTEXT_FULL, answer, continuation, messages_of, streamed, tools_of
from millrace.rollout.calls import Calls
from millrace.rollout.environment import EnvironmentKind
from millrace.rollout.sample import Message, Problem
from millrace.rollout.step import Action, Step
from millrace.rollout.toolbox import CLOSE_TIMEOUT

KEY_HEADER = "X-Millrace-Key"
SESSION_HEADER = "X-Session-ID"  # with which verifiers names the trace that a request belongs to
LARGEST_BODY = 64 * 2**20  # bytes


@asynccontextmanager
async def opened(
    config: EnvironmentConfig, calls: Calls, selections: Sequence[Mapping[str, Any]]
) -> AsyncIterator[tuple[EnvironmentKind, list[tuple[Problem, ...]]]]:
    """Yield a verifiers environment, whose episodes must end in the block, and the problems of each selection.

    Plays the first task up to its first request, which says what tools there are. Raises ConfigError, in one line, if
    the environment can't be loaded or does not ask.
    """
    assert config.verifiers is not None
    where = f"environment: the verifiers environment {config.verifiers}"
    with needs_extra(where):
        import verifiers.v1 as vf
    async with AsyncExitStack() as open_parts:
        try:
            loaded = vf.load_environment(
                vf.resolve_env_config(environment_settings(config.verifiers, config.arguments))
            )
            views = [loaded.taskset.select(vf.SelectConfig(**selection)) for selection in selections]
            if not all(view.bounded for view in views):
                raise ValueError("its tasks have no end; set select.limit in data and evaluation.data")
            chosen = [list(view) for view in views]
            if not all(chosen):
                raise ValueError("it has no tasks for data, or none for evaluation.data")
            endpoint = Endpoint(loaded, {task.data.idx: task for tasks in chosen for task in tasks})
            await open_parts.enter_async_context(endpoint.served())
            await open_parts.enter_async_context(loaded.serving())
            tools = await _tools(endpoint, chosen[0][0].data.idx, config.timeout)
        except Exception as error:  # the environment's code may raise anything
            raise ConfigError(f"{where} can't be used: {_line(error)}") from error
        make = partial(VerifiersEpisode, endpoint, tools)
        kind = EnvironmentKind(f"{config.verifiers} (verifiers)", "", make, True, tools, config.timeout, calls)
        yield kind, [tuple(_problem(task) for task in tasks) for tasks in chosen]


def environment_settings(taskset: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return verifiers' own settings: by default, programs run on this host, and run no commands of the model."""
    from verifiers.v1 import default_harness_id, env_config_type

    settings = dict(arguments)
    settings["taskset"] = {**settings.get("taskset", {}), "id": taskset}
    if "agent" in env_config_type(taskset, settings.get("id", "")).model_fields:
        agent = {"runtime": {"type": "subprocess"}, **settings.get("agent", {})}
        if "harness" not in agent and default_harness_id(taskset) == "bash":
            agent["harness"] = {"id": "null"}
        settings["agent"] = agent
    return settings


def _problem(task: Any) -> Problem:
    data = task.data
    row = data.model_dump(mode="json", exclude_none=True)
    return Problem(data.id or data.name or f"task-{data.idx}", (), {**row, "idx": data.idx})


@dataclass(slots=True)
class Endpoint:
    """The chat endpoint that verifiers asks, and what runs its episodes.

    environment: verifiers' own. tasks: by their index. playing: the episode of each trace.
    """

    environment: Any
    tasks: Mapping[int, Any]
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    playing: "dict[str, VerifiersEpisode]" = field(default_factory=dict)
    context: Any = None  # verifiers': the model and where it is asked

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Serve the endpoint on the loopback interface while the block runs."""
        import verifiers.v1 as vf

        app = web.Application(client_max_size=LARGEST_BODY)
        app.router.add_post("/v1/chat/completions", self._complete)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            client = vf.EvalClientConfig(
                base_url=f"http://127.0.0.1:{sock.getsockname()[1]}/v1",
                api_key_var="MILLRACE_NO_KEY",  # the default is the user's key for a hosted service
                headers={KEY_HEADER: self.key},
            )
            self.context = vf.ModelContext(model="policy", client=client)
            async with serving(app, sock, cancel=True):
                yield

    async def _complete(self, http: web.Request) -> web.Response:
        if not hmac.compare_digest(http.headers.get(KEY_HEADER, "").encode(), self.key.encode()):
            return reply({"error": {"message": "the key is missing or wrong", "code": 401}}, 401)
        episode = self.playing.get(http.headers.get(SESSION_HEADER, ""))
        if episode is None:
            return reply({"error": {"message": "no such episode is played", "code": 404}}, 404)
        body = await http.json()
        made = await episode.ask(body)
        if made is None:
            return reply(CONTEXT_FULL, 400)
        if not body.get("stream"):
            return reply(made)
        return web.Response(body=streamed(made), content_type="text/event-stream")


class VerifiersEpisode:
    """An episode of a verifiers environment.

    tools: the JSON schemas that its requests must have; None takes those of the first.
    """

    def __init__(self, endpoint: Endpoint, tools: tuple[Mapping[str, object], ...] | None) -> None:
        self.tools = tools
        self._endpoint = endpoint
        self._run: asyncio.Task[Any] | None = None
        self._requests: asyncio.Queue[tuple[Mapping[str, Any], asyncio.Future[Any]]] = asyncio.Queue()
        self._open: asyncio.Future[Any] | None = None  # the answer to the last request
        self._said: list[Message] = []  # the messages of the last request
        self._turn = 0
        self._traces: list[str] = []

    async def reset(self, row: Mapping[str, Any]) -> Sequence[Message]:
        """Start the episode of the row's task, and return the messages of its first request."""
        run = self._endpoint.environment.run_episode(
            self._endpoint.tasks[row["idx"]], self._endpoint.context, on_trace=self._began
        )
        self._run = asyncio.create_task(run)
        messages = await self._next()
        if messages is None:
            self._scored()  # which raises what failed
            raise UserCodeError("the episode ended before it asked the model")
        return messages

    async def step(self, action: Action) -> Step:
        """Answer the last request, and return what the next one adds, or the reward if the episode ends."""
        before = self._said
        self._reply(answer(action, self._turn))
        self._turn += 1
        messages = await self._next()
        return self._scored() if messages is None else Step(continuation(before, messages))

    async def finish(self) -> Step:
        """Tell the harness that the context is full, and return the reward."""
        self._reply(None)
        while await self._next() is not None:
            self._reply(None)
        return self._scored()

    async def close(self) -> None:
        """End the episode and its programs."""
        if self._run is not None:
            self._run.cancel()
            await asyncio.wait({self._run}, timeout=CLOSE_TIMEOUT)
        for trace in self._traces:
            self._endpoint.playing.pop(trace, None)
        if self._open is not None:
            self._open.cancel()

    async def ask(self, body: Mapping[str, Any]) -> Any:
        """Return the answer to a request of the harness, as soon as the sample has made it; None for none."""
        made = asyncio.get_running_loop().create_future()
        await self._requests.put((body, made))
        return await made

    def _reply(self, value: Any) -> None:
        """Answer the last request, unless the harness has given it up."""
        assert self._open is not None
        if not self._open.done():
            self._open.set_result(value)

    def _began(self, trace: Any) -> None:
        self._traces.append(trace.id)
        self._endpoint.playing[trace.id] = self

    async def _next(self) -> list[Message] | None:
        """Wait for the next request and return its messages; None if the episode has ended instead."""
        assert self._run is not None
        asked = asyncio.ensure_future(self._requests.get())
        try:
            await asyncio.wait({asked, self._run}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                return None
            body, self._open = asked.result()
        finally:
            asked.cancel()
        tools = tools_of(body)
        if self.tools is None:
            self.tools = tools
        elif tools != self.tools:
            raise UserCodeError("the task has other tools than the first one, and the prompts describe those of it")
        self._said = messages_of(body)
        return self._said

    def _scored(self) -> Step:
        """Return the reward of an ended episode and its parts. Raises UserCodeError if it failed."""
        assert self._run is not None
        episode = self._run.result()
        traces = [trace for trace in episode.traces if trace.id in self._traces]
        if (error := error_of(episode, traces)) is not None:
            raise UserCodeError(" ".join(": ".join(error).split()))
        total, parts = reward_of(traces)
        return Step("", total, True, parts)


def error_of(episode: Any, traces: Sequence[Any]) -> tuple[str, str] | None:
    """Return the type and the message of what failed last in an episode of verifiers; None if it did not fail."""
    if episode.ok:
        return None
    errors = [*(error for trace in traces for error in trace.errors), *episode.errors]
    return (errors[-1].type, errors[-1].message) if errors else ("it failed", "it says no reason")


def reward_of(traces: Sequence[Any]) -> tuple[float, dict[str, float]]:
    """Return the weighted sum of the rewards in traces of verifiers, and each of them without its weight."""
    rewards = {name: reward for trace in traces for name, reward in trace.rewards.items() if reward is not None}
    return sum(reward.value for reward in rewards.values()), {name: one.score for name, one in rewards.items()}


async def _tools(endpoint: Endpoint, idx: int, timeout: float) -> tuple[Mapping[str, object], ...]:
    """Return the tools of a task, by its first request. Raises UserCodeError or TimeoutError."""
    probe = VerifiersEpisode(endpoint, None)
    try:
        async with asyncio.timeout(timeout):
            await probe.reset({"idx": idx})
    except TimeoutError:
        raise UserCodeError(
            f"its first task did not ask the model within {timeout:g} s (environment.timeout)"
        ) from None
    finally:
        await probe.close()
    return probe.tools or ()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserCodeError) else f"{type(error).__name__}: {text}".removesuffix(": ")
