"""The weights to publish, in one form for all the forms in which trainers pass them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from millrace.errors import PublishError

if TYPE_CHECKING:
    import torch

    from millrace.weights.cast import Dtypes

NamedTensor = tuple[str, "torch.Tensor"]
Tensors = Iterable[NamedTensor]
Shape = tuple[int, ...]


@runtime_checkable
class Announcing(Protocol):
    """Tensors whose names and shapes are known before any of them is computed or gathered."""

    def shapes(self) -> Iterable[tuple[str, Shape]]: ...


@runtime_checkable
class ChecksItself(Protocol):
    """Tensors that find their own bad values, because iterating over them is expensive (`LedTensors`)."""

    def not_finite(self, dtypes: "Dtypes") -> list[str]:
        """Return the names of the tensors that have a NaN or an infinite value after the cast to `dtypes`. Blocks."""
        ...


@runtime_checkable
class Led(Protocol):
    """Tensors that are sharded over the trainer's ranks, which take part in a publish (`LedTensors`)."""

    @property
    def sharded(self) -> object:
        """The tensors of all ranks (`ShardedTensors`)."""
        ...


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Named tensors, each of which may be computed or gathered only when it is taken.

    pairs: returns an iterator over pairs of name and tensor.
    announce: returns the names and shapes, before any tensor is computed; None if they are unknown until then.
    once: whether the tensors can be iterated only once.
    at_hand: whether all tensors exist already, so that iterating is cheap.
    not_finite: returns the names of the tensors that have a NaN or an infinite value after a cast. None if the tensors
        must be iterated to find them.
    function: the trainer's function that returns the tensors, between publishes too; None if there is none.
    led: the sharded tensors that `pairs` gathers and converts; None if it gathers none.
    convert: what is done to the trainer's tensors, so also to others of the same names and shapes.
    """

    pairs: Callable[[], Iterator[NamedTensor]]
    announce: Callable[[], Iterable[tuple[str, Shape]]] | None = None
    once: bool = False
    at_hand: bool = False
    not_finite: Callable[["Dtypes"], list[str]] | None = None
    function: Callable[[], Tensors] | None = None
    led: Led | None = None
    convert: Callable[[Iterator[NamedTensor]], Iterator[NamedTensor]] = iter

    def __iter__(self) -> Iterator[NamedTensor]:
        return self.pairs()

    def shapes(self) -> dict[str, Shape] | None:
        """Return the shape of each tensor by its name; None if that is unknown until the tensors are computed.

        Raises PublishError if a name occurs twice.
        """
        if self.announce is None:
            return None
        named = list(self.announce())
        if twice := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
            raise PublishError(f"the trainer named a tensor twice: {twice[0]}")
        return dict(named)

    def opened(self) -> "WeightSource":
        """Call the trainer's function, and return what it returned as a source. It is called again for each further
        iteration if it returned an iterator. Without a function, return this source.

        Raises PublishError if the function did not return pairs of name and tensor, and whatever it raises.
        """
        function = self.function
        if function is None:
            return self
        first = source_of(function())
        if not first.once:
            return first
        unread = [first]

        def pairs() -> Iterator[NamedTensor]:
            return iter(unread.pop() if unread else source_of(function()))

        return replace(first, pairs=pairs, once=False)

    def converted(
        self,
        convert: Callable[[Iterator[NamedTensor]], Iterator[NamedTensor]],
        shapes: Mapping[str, Shape] | None = None,
    ) -> "WeightSource":
        """Return a source of converted tensors. They are converted when they are taken.

        shapes: the shape of each converted tensor by name; None if the conversion keeps names and shapes.
        """
        announce = self.announce if shapes is None else shapes.items
        return WeightSource(
            lambda: convert(iter(self)),
            announce,
            self.once,
            not_finite=self.not_finite,
            led=self.led,
            convert=lambda tensors: convert(self.convert(tensors)),
        )


def weight_source(given: object) -> WeightSource:
    """Return what a trainer passed as a source: pairs of name and tensor, or a function that returns them. The function
    is not called yet.

    A model is callable too, but not such a function. Raises PublishError as `source_of` does.
    """
    if callable(given) and not isinstance(given, Iterable) and not hasattr(given, "named_parameters"):
        return WeightSource(lambda: iter(source_of(given())), function=given)
    return source_of(given)


def source_of(given: object) -> WeightSource:
    """Return pairs of name and tensor as a source.

    Raises PublishError if `given` is no iterable of pairs, such as a model or a dict.
    """
    if isinstance(given, Mapping | str) or not isinstance(given, Iterable):
        hint = "its .items()" if isinstance(given, Mapping) else "list(model.named_parameters())"
        raise PublishError(
            f"tensors must be pairs of name and tensor, and are of type {type(given).__name__}; give {hint}"
        )
    announce: Callable[[], Iterable[tuple[str, Shape]]] | None = None
    at_hand = isinstance(given, Collection)
    if isinstance(given, Announcing):
        announce = given.shapes
    elif at_hand:
        announce = partial(_shapes_of, given)
    return WeightSource(
        lambda: iter(given),
        announce,
        once=isinstance(given, Iterator),
        at_hand=at_hand,
        not_finite=given.not_finite if isinstance(given, ChecksItself) else None,
        led=given if isinstance(given, Led) else None,
    )


def _shapes_of(tensors: Tensors) -> Iterator[tuple[str, Shape]]:
    return ((name, tuple(tensor.shape)) for name, tensor in tensors)
