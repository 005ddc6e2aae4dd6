"""The steps of the fault tests, and random sequences of them."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from millrace.config.models import TransportName
from tests.weights.variants import NamedTensor

Fault = Literal[
    "older", "again", "iterator", "infinite", "missing", "renamed", "reshaped", "twice", "raises", "cancelled"
]
FAULTS: tuple[Fault, ...] = (
    "older",
    "again",
    "iterator",
    "infinite",
    "missing",
    "renamed",
    "reshaped",
    "twice",
    "raises",
    "cancelled",
)
EXAMPLES = os.environ.get("MILLRACE_FAULT_EXAMPLES")
KINDS = 4  # a sequence has at least this many kinds of steps: starting the fleet is too slow for fewer
HARMLESS: tuple[Fault, ...] = ("older", "iterator", "infinite")  # refused before an update begins


@dataclass(frozen=True, slots=True)
class Publish:
    """Publishes other weights than the last time."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A publish that can't succeed. With `again`, a second publish starts in the middle of a good one."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class Kill:
    """Kills an engine. With `midway`, this happens during a publish, while the tensors are iterated."""

    engine: int
    midway: bool


@dataclass(frozen=True, slots=True)
class Hang:
    """Stops an engine in the middle of a publish. With `resumes`, it goes on when the others have the version."""

    engine: int
    resumes: bool


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Changes bytes of a publish after they were checksummed: those that `engine` reads, or with None those that all
    engines read."""

    engine: int | None


@dataclass(frozen=True, slots=True)
class Refuse:
    """Makes an embedded engine fail half-way through a load of a publish, by its fault injection."""

    engine: int


@dataclass(frozen=True, slots=True)
class CorruptStore:
    """Changes bytes in the stored folder of the served version, then restarts an engine from that folder."""

    engine: int


@dataclass(frozen=True, slots=True)
class Restart:
    engine: int


@dataclass(frozen=True, slots=True)
class SwitchTransport:
    """Publishes by this transport from now on."""

    transport: TransportName


Step = Publish | Bad | Kill | Hang | Corrupt | Refuse | CorruptStore | Restart | SwitchTransport


def sequences(engines: int, *, least: int, most: int) -> st.SearchStrategy[list[Step]]:
    engine = st.integers(0, engines - 1)
    step = st.one_of(
        st.builds(Publish),
        st.builds(Bad, st.sampled_from(FAULTS)),
        st.builds(Kill, engine, st.booleans()),
        st.builds(Hang, engine, st.booleans()),
        st.builds(Corrupt, st.none() | engine),
        st.builds(Refuse, engine),
        st.builds(CorruptStore, engine),
        st.builds(Restart, engine),
        st.builds(SwitchTransport, st.sampled_from(["auto", "gloo", "disk"])),
    )
    return st.lists(step, min_size=least, max_size=most).filter(lambda steps: len({*map(type, steps)}) >= KINDS)


def at_random(engines: int, *, least: int, most: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test of `steps` on random sequences, as many as MILLRACE_FAULT_EXAMPLES says. Each takes minutes."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        drawn = given(steps=sequences(engines, least=least, most=most))(test)
        counted = settings(
            max_examples=int(EXAMPLES or 1), phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow]
        )(drawn)
        reason = "MILLRACE_FAULT_EXAMPLES says how many sequences to draw"
        skipped = pytest.mark.skipif(EXAMPLES is None, reason=reason)(counted)
        test_when_asked: Callable[..., None] = pytest.mark.timeout(0)(skipped)
        return test_when_asked

    return decorate


class Source:
    """Tensors that can be iterated again. The first iteration calls `happens` after half of them."""

    def __init__(self, tensors: Sequence[NamedTensor], happens: Callable[[], object] = lambda: None) -> None:
        self._tensors, self._happens = tensors, happens
        self._rounds = itertools.count()

    def __iter__(self) -> Iterator[NamedTensor]:
        first = next(self._rounds) == 0
        for index, entry in enumerate(self._tensors):
            if first and index == len(self._tensors) // 2:
                self._happens()
            yield entry


class TrainerError(Exception):
    """Raised by the trainer's iterator, in the middle of its tensors."""


def damaged(tensors: Sequence[NamedTensor], fault: Fault) -> list[NamedTensor]:
    """Returns the tensors with the fault in the middle one. A fault that is not of tensors leaves them as they are."""
    middle = len(tensors) // 2
    (name, tensor), before, behind = tensors[middle], list(tensors[:middle]), list(tensors[middle + 1 :])
    match fault:
        case "infinite":
            worse = tensor.clone()
            worse.reshape(-1)[-1] = float("nan")
            return [*before, (name, worse), *behind]
        case "missing":
            return before + behind
        case "renamed":
            return [*before, (f"{name}.other", tensor), *behind]
        case "reshaped":
            return [*before, (name, tensor[:-1].contiguous()), *behind]
        case "twice":
            return [*before, (name, tensor), (name, tensor), *behind]
        case _:
            return list(tensors)
