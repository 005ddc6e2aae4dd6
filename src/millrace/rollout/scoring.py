"""The reward of a sample: the weighted sum of functions that see its conversation."""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from millrace.arguments import shown
from millrace.config.tasks import RewardConfig
from millrace.errors import ConfigError, UserCodeError
from millrace.rollout.calls import Calls, CallTimeout
from millrace.rollout.reward import gsm8k
from millrace.rollout.sample import Episode, Message, Problem
from millrace.rollout.user_code import file_of, load_code, parameters, place, said

RESERVED = ("judge", "environment")  # names of parts that are no functions


@dataclass(frozen=True, slots=True)
class Played:
    """An episode as reward functions see it. The names of the fields are the parameters that they may name.

    conversation: the chat messages of prompt and episode. answer: the text of the model's last turn, without its
    reasoning. row: of the data set. episode: as token ids.
    """

    conversation: tuple[Message, ...]
    answer: str
    row: Mapping[str, object]
    problem: Problem
    episode: Episode

    @classmethod
    def of(cls, problem: Problem, episode: Episode, answer: str) -> Self:
        """Return an episode with its conversation."""
        return cls((*problem.messages, *episode.messages), answer, problem.row, problem, episode)


FOR_ONE = {name: name for name in ("conversation", "answer", "row", "problem", "episode")}
FOR_A_GROUP = {f"{name}s": name for name in FOR_ONE}


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A function of the user that returns a reward.

    where: file and name, for error messages. takes: the fields of Played by the parameters that it names. batch:
    whether it is called once for a whole group, with a list for each parameter, and returns a list.
    """

    name: str
    where: str
    function: Callable[..., object]
    takes: Mapping[str, str]
    batch: bool
    weight: float = 1.0

    @classmethod
    def of(cls, function: Callable[..., object], *, name: str = "", where: str = "", weight: float = 1.0) -> Self:
        """Return a function after checking its signature. Raises ConfigError if it can't be called."""
        name = name or str(getattr(function, "__name__", type(function).__name__))
        where = where or name
        named = parameters(function, where, {**FOR_ONE, **FOR_A_GROUP})
        batch = [parameter in FOR_A_GROUP for parameter in named]
        if any(batch) != all(batch):
            raise ConfigError(
                f"{where} mixes parameters of one sample with those of a group: {', '.join(named)}. For one sample a "
                f"function may name {', '.join(FOR_ONE)}; for a group {', '.join(FOR_A_GROUP)}"
            )
        takes = {parameter: {**FOR_ONE, **FOR_A_GROUP}[parameter] for parameter in named}
        return cls(name, where, function, takes, all(batch), weight)

    async def one(self, played: Played, calls: Calls, *, deadline: float) -> float:
        """Return the value for one sample. Raises UserCodeError."""
        row = f"row {played.problem.problem_id}"
        given = {parameter: getattr(played, name) for parameter, name in self.takes.items()}
        return self._number(await self._call(calls, given, row, deadline), row)

    async def group(self, samples: Sequence[Played], calls: Calls, *, deadline: float) -> list[float]:
        """Return the values for the samples of a group. Raises UserCodeError."""
        row = f"row {samples[0].problem.problem_id}"
        given = {parameter: [getattr(one, name) for one in samples] for parameter, name in self.takes.items()}
        values = await self._call(calls, given, row, deadline)
        try:
            listed = list(values)
        except TypeError:
            raise UserCodeError(
                f"the reward {self.where} returned {shown(values)} for {row}; it must return a list with a number for "
                "each sample of the group"
            ) from None
        if len(listed) != len(samples):
            raise UserCodeError(
                f"the reward {self.where} returned {len(listed)} values for the {len(samples)} samples of {row}"
            )
        return [self._number(value, row) for value in listed]

    async def _call(self, calls: Calls, given: Mapping[str, object], row: str, deadline: float) -> Any:
        try:
            return await calls.run(self.function, given, deadline=deadline)
        except CallTimeout as error:
            raise UserCodeError(f"the reward {self.where} hangs for {row}: {error}") from None
        except Exception as error:  # the user's function may raise anything
            raise UserCodeError(
                f"the reward {self.where} failed for {row}: {said(error, file_of(self.function))}"
            ) from error

    def _number(self, value: Any, row: str) -> float:
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserCodeError(f"the reward {self.where} returned {shown(value)} for {row}; it must return a number")
        return number


GSM8K = RewardFunction.of(gsm8k, where="millrace.rollout.reward:gsm8k")


@dataclass(frozen=True, slots=True)
class Rewards:
    """The reward functions of a run, and what runs them.

    >>> rewards = Rewards((RewardFunction.of(exact), RewardFunction.of(short, weight=0.1)))
    """

    functions: tuple[RewardFunction, ...] = (GSM8K,)
    calls: Calls = field(default_factory=Calls)

    def __post_init__(self) -> None:
        names = [function.name for function in self.functions]
        for name in names:
            if names.count(name) > 1 or name in RESERVED:
                raise ConfigError(
                    f"reward: {names.count(name)} functions are called {name!r}; give each a name of its own"
                    if name not in RESERVED
                    else f"reward: no function may be called {name!r}, which names another part of the reward"
                )

    @property
    def of_groups(self) -> tuple[RewardFunction, ...]:
        """The functions that see whole groups."""
        return tuple(function for function in self.functions if function.batch)

    @property
    def by_rule(self) -> bool:
        """Whether the built-in rule is one of the functions."""
        return any(function.function is gsm8k for function in self.functions)

    async def for_sample(self, played: Played, *, deadline: float) -> dict[str, float]:
        """Return the values of the functions that see one sample, by name, within `deadline` seconds for all of them.

        Raises UserCodeError.
        """
        ends = asyncio.get_running_loop().time() + deadline
        parts: dict[str, float] = {}
        for function in self.functions:
            if not function.batch:
                left = ends - asyncio.get_running_loop().time()
                parts[function.name] = await function.one(played, self.calls, deadline=left)
        return parts

    async def for_group(self, samples: Sequence[Played], *, deadline: float) -> list[dict[str, float]]:
        """Return the values of the functions that see whole groups, by name, for each sample. As `for_sample`."""
        ends = asyncio.get_running_loop().time() + deadline
        parts: list[dict[str, float]] = [{} for _ in samples]
        for function in self.of_groups:
            left = ends - asyncio.get_running_loop().time()
            for part, value in zip(parts, await function.group(samples, self.calls, deadline=left), strict=True):
                part[function.name] = value
        return parts

    def total(self, parts: Mapping[str, float]) -> float:
        """Return the weighted sum of the functions' values. Functions without a value count as 0."""
        return sum(function.weight * parts.get(function.name, 0.0) for function in self.functions)


def load_rewards(configs: Sequence[RewardConfig], calls: Calls) -> Rewards:
    """Return the reward functions of the settings. Raises ConfigError if one can't be used."""
    functions = []
    for config in configs:
        function, where = load_code(config.path, config.name, "reward"), place(config.path, config.name)
        if isinstance(function, type) or not callable(function):
            raise ConfigError(f"reward: {where} is no function")
        functions.append(RewardFunction.of(function, name=config.name, where=where, weight=config.weight))
    return Rewards(tuple(functions), calls)
