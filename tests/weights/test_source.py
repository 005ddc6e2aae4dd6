"""What trainers pass to a publish, as one kind of source."""

from collections.abc import Callable, Iterator

import pytest
import torch

from millrace.errors import PublishError
from millrace.weights.cast import Dtypes
from millrace.weights.source import source_of, weight_source

NAMED = [("a", torch.ones(2, 3)), ("b", torch.zeros(4))]
SHAPES = {"a": (2, 3), "b": (4,)}


class Gathered:
    """Tensors that are gathered when their turn comes, with names and shapes that are known before."""

    def __init__(self) -> None:
        self.rounds = 0

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return list(SHAPES.items())

    def not_finite(self, dtypes: Dtypes) -> list[str]:
        return ["b"]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.rounds += 1
        yield from NAMED


@pytest.mark.parametrize(
    ("given", "shapes", "once", "at_hand"),
    [
        (lambda: NAMED, SHAPES, False, True),
        (lambda: dict(NAMED).items(), SHAPES, False, True),
        (lambda: iter(NAMED), None, True, False),
        (Gathered, SHAPES, False, False),
    ],
    ids=["list", "items", "iterator", "gathered"],
)
def test_what_is_known_of_it(
    given: Callable[[], object], shapes: dict[str, tuple[int, ...]] | None, once: bool, at_hand: bool
) -> None:
    source = weight_source(given())
    assert (source.shapes(), source.once, source.at_hand, source.function) == (shapes, once, at_hand, None)
    assert source.opened() is source
    assert list(source) == NAMED
    assert list(source) == ([] if once else NAMED)


def test_a_function_is_called_when_the_source_is_opened_and_for_what_comes_only_once_again() -> None:
    calls = 0

    def count(made: Callable[[], object]) -> Callable[[], object]:
        def function() -> object:
            nonlocal calls
            calls += 1
            return made()

        return function

    source = weight_source(count(lambda: NAMED))
    assert (calls, source.once) == (0, False)
    opened = source.opened()
    assert (opened.shapes(), opened.at_hand, opened.function) == (SHAPES, True, None)
    assert [list(opened), list(opened), calls] == [NAMED, NAMED, 1]

    opened = weight_source(count(lambda: iter(NAMED))).opened()
    assert (opened.shapes(), opened.once, calls) == (None, False, 2)
    assert [list(opened), calls] == [NAMED, 2]
    assert [list(opened), calls] == [NAMED, 3]


def test_a_conversion_keeps_what_is_known() -> None:
    gathered = Gathered()
    source = source_of(gathered).converted(lambda tensors: ((name, tensor * 2) for name, tensor in tensors))
    assert (source.shapes(), source.once, source.at_hand, gathered.rounds) == (SHAPES, False, False, 0)
    assert source.not_finite is not None
    assert source.not_finite(Dtypes(None, {})) == ["b"]
    assert [name for name, _ in source] == ["a", "b"]
    other = source.converted(lambda tensors: ((f"{name}.c", tensor[0]) for name, tensor in tensors), {"a.c": (3,)})
    assert other.shapes() == {"a.c": (3,)}
    assert source_of(iter(NAMED)).converted(lambda tensors: tensors).once


@pytest.mark.parametrize(
    "wrong", [dict(NAMED), "a", None, torch.nn.Linear(1, 1)], ids=["dict", "text", "none", "model"]
)
def test_what_are_no_pairs_is_refused(wrong: object) -> None:
    with pytest.raises(PublishError, match="tensors must be pairs of name and tensor, and are of type"):
        weight_source(wrong)
    with pytest.raises(PublishError, match="tensors must be pairs of name and tensor, and are of type"):
        weight_source(lambda: wrong).opened()


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(PublishError, match="the trainer named a tensor twice: a"):
        source_of([*NAMED, NAMED[0]]).shapes()
