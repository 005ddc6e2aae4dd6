"""The version that the trainer can provide again between two publishes, for engines that restart or join."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from millrace.errors import PublishError
from millrace.weights.fingerprint import Fingerprint

if TYPE_CHECKING:
    import torch

Tensors = Iterable[tuple[str, "torch.Tensor"]]


@dataclass(frozen=True, slots=True)
class Republishable:
    """A version whose tensors `ask` returns again. `fingerprint` detects that they have changed."""

    ask: Callable[[], Tensors]
    version: int
    fingerprint: Fingerprint = field(default_factory=Fingerprint)

    def tensors(self) -> Tensors:
        """Call `ask` for the tensors.

        Raises PublishError if they are not pairs of name and tensor, and whatever `ask` raises.
        """
        tensors = require_pairs(self.ask())
        return _Asked(self.ask, tensors) if isinstance(tensors, Iterator) else tensors


class _Asked:
    """An iterable over the tensors of a function that returns a new iterator with each call."""

    def __init__(self, ask: Callable[[], Tensors], first: Iterator[tuple[str, "torch.Tensor"]]) -> None:
        self._ask = ask
        self._first: Iterator[tuple[str, torch.Tensor]] | None = first

    def __iter__(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        first, self._first = self._first, None
        return first if first is not None else iter(self._ask())


def republishable(source: object, version: int) -> Republishable | None:
    """Return the version if `source` is a function that returns its tensors, and None if it is anything else.

    A model is callable too, but not such a function.
    """
    if callable(source) and not isinstance(source, Iterable) and not hasattr(source, "named_parameters"):
        return Republishable(source, version)
    return None


def require_pairs(tensors: object) -> Tensors:
    """Return the tensors. Raises PublishError if they are no iterable of pairs, such as a model or a dict."""
    if isinstance(tensors, Mapping | str) or not isinstance(tensors, Iterable):
        hint = "its .items()" if isinstance(tensors, Mapping) else "list(model.named_parameters())"
        raise PublishError(
            f"tensors must be pairs of name and tensor, and are of type {type(tensors).__name__}; give {hint}"
        )
    return tensors
