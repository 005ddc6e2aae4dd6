"""Environments: classes of the user that answer the model's turns with observations and rewards."""

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from millrace.arguments import shown
from millrace.config.tasks import EnvironmentConfig
from millrace.errors import ConfigError, UserCodeError
from millrace.rollout.agent import Turn
from millrace.rollout.calls import Calls, CallTimeout, Worker, is_async
from millrace.rollout.images import read_messages
from millrace.rollout.sample import EpisodeEnd, Message, Problem
from millrace.rollout.step import Action, Step
from millrace.rollout.toolbox import CLOSE_TIMEOUT, name_in
from millrace.rollout.tools import BadToolCall, ToolCall, typed
from millrace.rollout.user_code import file_of, load_code, place, said
from millrace.tracing import span

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EnvironmentKind:
    """The environment of a run: a class, of which each episode has an instance.

    where, file: name and file of the class, for error messages; an adapter's has no file. make: makes an instance.
    on_loop: whether its methods are async. tools: JSON schemas for the prompts. timeout: seconds for each call of an
    instance.
    """

    where: str
    file: str | None
    make: Callable[[], Any]
    on_loop: bool
    tools: tuple[Mapping[str, object], ...]
    timeout: float
    calls: Calls

    def episode(self, problem: Problem) -> "EnvironmentEpisode":
        """Return the environment of one episode, which nothing has been asked of yet."""
        return EnvironmentEpisode(self, problem)


@dataclass(slots=True)
class EnvironmentEpisode:
    """One instance of an environment. It is an async context manager, which closes the instance.

    reward: the sum so far. named: what the environment says it is made of, by name.
    """

    kind: EnvironmentKind
    problem: Problem
    reward: float = 0.0
    named: dict[str, float] = field(default_factory=dict)
    _instance: Any = None
    _worker: Worker | None = None
    _running: "asyncio.Future[object] | None" = field(default=None, init=False)

    async def __aenter__(self) -> "EnvironmentEpisode":
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._instance is None and self._worker is not None:  # its constructor failed, or may return later
            self._worker.run(self._close_late).add_done_callback(lambda ended: ended.exception())
            self._worker.end()
            return
        try:
            if (close := getattr(self._instance, "close", None)) is not None:
                await self._call("close", close, CLOSE_TIMEOUT)
        except UserCodeError as error:  # the episode's result stands
            log.warning("%s", error)
        finally:
            self._end_worker()

    async def reset(self) -> Sequence[Message]:
        """Make the instance and return the messages of the prompt. Raises UserCodeError."""
        kind = self.kind
        await self._call("__init__", self._make, kind.timeout)
        observation = await self._call("reset", self._instance.reset, kind.timeout, self.problem.row)
        return (*self.problem.messages, *self._messages("reset", observation))

    async def respond(self, turn: Turn) -> Sequence[Message] | EpisodeEnd:
        """Pass a turn of the model to the instance. Raises UserCodeError."""
        schemas = {name_in(schema): schema for schema in self.kind.tools}
        calls = [typed(c, schemas.get(c.name, {})) for c in turn.calls if isinstance(c, ToolCall)]
        errors = tuple(call.reason for call in turn.calls if isinstance(call, BadToolCall))
        action = Action(turn.text, tuple(calls), errors, turn.cut)
        step = self._counted("step", await self._call("step", self._instance.step, self.kind.timeout, action))
        if step.done:
            return EpisodeEnd.ENVIRONMENT_DONE
        return EpisodeEnd.TURN_LIMIT if turn.last else self._messages("step", step.observation)

    @property
    def parts(self) -> dict[str, float]:
        """The parts of the reward, for the records: one, if the environment names none."""
        return self.named or {"environment": self.reward}

    async def finish(self, end: EpisodeEnd) -> None:
        """Ask the instance for the reward of an episode that a limit ended, if it gives one. Raises UserCodeError."""
        if end is not EpisodeEnd.ENVIRONMENT_DONE and hasattr(self._instance, "finish"):
            self._counted("finish", await self._call("finish", self._instance.finish, self.kind.timeout))

    def _make(self) -> None:
        self._instance = self.kind.make()

    def _close_late(self) -> None:
        if hasattr(self._instance, "close"):
            self._instance.close()

    def _counted(self, method: str, step: object) -> Step:
        """Return what the method returned, and add its rewards. Raises UserCodeError if it is no Step."""
        if not isinstance(step, Step):
            raise self._error(method, f"returned {shown(step)}; it must return Step(observation, reward, done)")
        self.reward += self._number(method, step.reward)
        for name, part in step.parts.items():
            self.named[name] = self.named.get(name, 0.0) + self._number(method, part)
        return step

    def _number(self, method: str, value: Any) -> float:
        try:
            reward = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            reward = math.nan
        if not math.isfinite(reward):
            raise self._error(method, f"returned the reward {shown(value)}; it must be a number")
        return reward

    def _messages(self, method: str, observation: object) -> Sequence[Message]:
        match observation:
            case str() if observation:
                return ({"role": "user", "content": observation},)
            case list() | tuple() if (_is_prompt if method == "reset" else _can_follow)(observation):
                try:
                    return read_messages(observation, (), Path())
                except ValueError as error:
                    raise self._error(method, f"returned an observation that can't be read: {error}") from error
        raise self._error(
            method,
            f"returned the observation {shown(observation)}; it must be a text that is not empty, or a list of "
            'messages such as {"role": "user", "content": "..."}, those of tools before those of the user',
        )

    async def _call(self, method: str, function: Callable[..., object], deadline: float, *arguments: object) -> Any:
        """Call the instance: on the event loop if its methods are async, otherwise in the instance's own thread."""
        with span("environment", {"millrace.method": method}):
            return await self._called(method, function, deadline, *arguments)

    async def _called(self, method: str, function: Callable[..., object], deadline: float, *arguments: object) -> Any:
        calls, bound = self.kind.calls, partial(function, *arguments)
        try:
            if self.kind.on_loop:
                return await calls.run(_as_async(bound), deadline=deadline)
            if self._worker is None or (self._running is not None and not self._running.done()):
                calls.require_threads()
                self._end_worker()  # if there is one, it hangs
                self._worker = Worker(self.kind.where)
            self._running = self._worker.run(bound)
            return await calls.result(self._running, function, deadline, deadline)
        except CallTimeout as error:
            raise self._error(method, f"hangs: {error}") from None
        except UserCodeError as error:  # of an adapter, whose place in the code says nothing
            raise self._error(method, f"failed: {error}") from error
        except Exception as error:  # the user's code may raise anything
            raise self._error(method, f"failed: {said(error, self.kind.file)}") from error

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.end()

    def _error(self, method: str, what: str) -> UserCodeError:
        row = self.problem.problem_id
        return UserCodeError(f"the environment {self.kind.where} {what} (in {method}, for row {row})")


def _is_prompt(messages: Sequence[Any]) -> bool:
    """Return whether these messages can begin a conversation, whose next turn is the model's."""
    return _have_roles(messages, {"system", "user", "assistant"}) and messages[-1]["role"] == "user"


def _can_follow(messages: Sequence[Any]) -> bool:
    """Return whether these messages can follow a turn of the model: those of tools first."""
    given = [one.get("role") for one in messages if isinstance(one, Mapping)]
    return _have_roles(messages, {"tool", "user"}) and given == sorted(given, key=lambda role: role == "user")


def _have_roles(messages: Sequence[Any], roles: Collection[str]) -> bool:
    return bool(messages) and all(
        isinstance(one, Mapping) and isinstance(one.get("content"), str | list) and one.get("role") in roles
        for one in messages
    )


def load_environment(config: EnvironmentConfig, calls: Calls) -> EnvironmentKind:
    """Return the environment of a class. Nothing of it is called. Raises ConfigError if it can't be used."""
    assert config.path is not None
    assert config.name is not None
    code, where = load_code(config.path, config.name, "environment"), place(config.path, config.name)
    if not inspect.isclass(code):
        raise ConfigError(f"environment: {where} is no class")
    for method, arguments in (("reset", ("row",)), ("step", ("action",)), ("close", ())):
        function = getattr(code, method, None)
        if function is None and method != "close":
            raise ConfigError(f"environment: {where} has no method {method}({', '.join(arguments)})")
        if function is not None:
            _require_call(function, f"environment: {where}.{method}", (None, *arguments), {})
    _require_call(code, f"environment: {where}", (), config.arguments)
    tools = getattr(code, "tools", ())
    if not isinstance(tools, list | tuple):
        raise ConfigError(f"environment: {where}.tools must be an attribute of the class: a list of JSON schemas")
    try:
        for schema in tools:
            name_in(schema)
    except ConfigError as error:
        raise ConfigError(f"environment: {where}.tools: {error}") from error
    make, on_loop = partial(code, **config.arguments), is_async(getattr(code, "reset"))  # noqa: B009
    return EnvironmentKind(where, file_of(code), make, on_loop, tuple(tools), config.timeout, calls)


def _require_call(
    function: Callable[..., object], where: str, arguments: Sequence[object], named: Mapping[str, object]
) -> None:
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        raise ConfigError(f"{where} can't be called as it will be: {error}") from error


def _as_async(function: Callable[[], Any]) -> Callable[[], Any]:
    async def call() -> object:
        result = function()
        return await result if inspect.isawaitable(result) else result

    return call
