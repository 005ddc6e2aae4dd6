"""What a trainer hands in, as the tensors of the model's checkpoint: under their names, each once, none missing.

Trainers wrap their models (DDP, FSDP, torch.compile, PEFT), name tied tensors once or twice, and hold experts fused,
as transformers does (`millrace.checkpoint_names`). Engines are sent the tensors that the model's folder has.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch

from millrace.errors import DataError, PublishError
from millrace.model_folder import StoredTensor, has_weights, stored_tensors
from millrace.weights.folder import read_tensor
from millrace.weights.plan import announced

if TYPE_CHECKING:
    from millrace.checkpoint_names import CheckpointNames, Group

NamedTensor = tuple[str, torch.Tensor]
Shape = tuple[int, ...]
T = TypeVar("T")

# What DDP, torch.compile, FSDP, activation checkpointing and PEFT put into the names of a model's tensors. Of modules
# that PEFT trains whole, `modules_to_save`, it keeps the untrained original beside.
WRAPPERS = re.compile(
    r"^((module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\.)+"
    r"|(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|modules_to_save\.[^.]+)\."
)
ADAPTER = re.compile(r"(^|\.)lora_\w+(\.|$)")
REPLACED = re.compile(r"\.original_module\.")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that is trained.

    stored: the tensors of its folder, empty where that has none. names: how they are made of the model's tensors, None
    where transformers does not know the model. kept: the tensors that are sent as they are in the folder if the trainer
    does not give them: buffers, and what the model's class ignores."""

    stored: Mapping[str, StoredTensor]
    names: "CheckpointNames | None"
    kept: frozenset[str]

    def tensors(self, given: Iterable[NamedTensor]) -> Iterable[NamedTensor]:
        """The checkpoint's tensors of what a trainer gives, lazily: as often as `given` can be gone through, and with
        shapes that are known before where those of `given` are.

        Raises PublishError where two names are one tensor, tied tensors differ, a fused tensor has another shape than
        in the model, a tensor is sharded, or there are tensors of an adapter: at once where the shapes are known,
        otherwise on the way. What the model does not have is passed on, and what is missing is missing: engines refuse
        both by name."""
        shapes = announced(given)
        if shapes is None:
            tensors = CheckpointTensors(self, given, None)
            return iter(tensors) if isinstance(given, Iterator) else tensors
        walk = _Walk(self, _Shapes(self), None)
        made = dict(walk.all(shapes.items()))
        if isinstance(given, Collection):
            self._require_sound(given)
        if walk.added:
            logger.info("not given by the trainer, and as in the model's folder: %s", shown(walk.added))
        return AnnouncedTensors(self, given, frozenset(walk.given), made)

    def resolve(self, name: str) -> str | None:
        """The model's or the checkpoint's name of what the trainer calls `name`; None for a tensor that is left out.
        Raises PublishError for a tensor of an adapter."""
        if self._knows(name):
            return name
        if ADAPTER.search(name):
            raise PublishError(
                f"{name} is a tensor of an adapter and not of the model: merge the adapter and leave its tensors out "
                "(merge_and_unload does both), or publish it alone (publish_adapter)"
            )
        bare = WRAPPERS.sub("", name)
        needless = REPLACED.search(name) or (self.names is not None and self.names.passes_over(bare))
        return None if needless and not self._knows(bare) else bare

    def _knows(self, name: str) -> bool:
        return name in self.stored or (self.names is not None and name in self.names.groups)

    def tied_to(self, name: str) -> str:
        """The name of the tensor that it shares; `name` itself where it is not tied."""
        return self.names.tied.get(name, name) if self.names is not None else name

    def alike(self, name: str) -> set[str]:
        """The model's names of the tensors that are one with this."""
        tied = self.names.tied if self.names is not None else {}
        first = self.tied_to(name)
        return {first, *(target for target, source in tied.items() if source == first)}

    def outputs(self, name: str) -> list[str]:
        """The checkpoint's names of a tensor of the model that is only renamed. A tied tensor has all the names that
        the folder has for it."""
        assert self.names is not None
        groups = self.names.groups
        names = [output for one in sorted(self.alike(name)) for output in groups[one].names]
        return [one for one in names if one in self.stored] or list(groups[self.tied_to(name)].names)

    def _require_sound(self, given: Iterable[NamedTensor]) -> None:
        """Checks tensors that exist already, before anything is sent: none is sharded, and tied ones are the same."""
        alike: dict[str, list[NamedTensor]] = {}
        for name, tensor in given:
            if hasattr(tensor, "full_tensor"):
                raise PublishError(
                    f"{name} is sharded over the trainer's ranks, all of which must take part; publish "
                    "millrace.weights.sharded.ShardedTensors (docs/weights.md)"
                )
            if (resolved := self.resolve(name)) is not None:
                alike.setdefault(self.tied_to(resolved), []).append((name, tensor))
        for first, *others in alike.values():
            for other in others:
                _require_same(first, other, _same)


@dataclass(frozen=True, slots=True)
class CheckpointTensors:
    """The checkpoint's tensors, made of a trainer's. `expected`: the model's names of all that the trainer gives, None
    where these are not known before."""

    trained: Trained
    given: Iterable[NamedTensor]
    expected: frozenset[str] | None

    def __iter__(self) -> Iterator[NamedTensor]:
        return _Walk(self.trained, _Tensors(self.trained), self.expected).all(self.given)


@dataclass(frozen=True, slots=True)
class AnnouncedTensors(CheckpointTensors):
    """The same, with names and shapes that are known before: `made`."""

    made: Mapping[str, Shape]

    def shapes(self) -> list[tuple[str, Shape]]:
        return list(self.made.items())


def read_trained(folder: Path) -> Trained:
    """The model in `folder`; where that is not on this host, only wrappers are taken off. Raises DataError where the
    folder's weights are damaged, and PublishError where it has a tied tensor twice, with different values."""
    if not (folder / "config.json").is_file():
        return Trained({}, None, frozenset())
    from millrace.checkpoint_names import read_names  # imports transformers

    stored = stored_tensors(folder) if has_weights(folder) else {}
    try:
        names = read_names(folder, stored.keys() or None)
    except DataError as error:
        logger.info("tensors go to the engines under the trainer's names: %s", error)
        return Trained(stored, None, frozenset())
    buffers = {name for buffer in names.buffers for name in names.groups[buffer].names}
    made = {name for group in names.groups.values() for name in group.names}
    kept = frozenset(name for name in stored if name in buffers or (name not in made and names.passes_over(name)))
    for target, source in names.tied.items():
        both = [name for one in (source, target) for name in names.groups[one].names if name in stored]
        if len(both) == 2 and not _same(*(read_tensor(stored[name], name) for name in both)):
            raise PublishError(
                f"{both[0]} and {both[1]} differ in {folder}, whose config ties them (tie_word_embeddings): engines "
                "would use one of them; set that to false there, or take one of the tensors out"
            )
    return Trained(stored, names, kept)


class _Kind(Protocol[T]):
    """What a walk goes over: tensors, or their shapes alone."""

    def convert(self, group: "Group", values: Sequence[T]) -> Mapping[str, T]: ...

    def same(self, one: T, other: T) -> bool: ...

    def shape(self, value: T) -> Shape: ...

    def stored(self, name: str, beside: T | None) -> T: ...


@dataclass(frozen=True, slots=True)
class _Shapes:
    trained: Trained

    def convert(self, group: "Group", values: Sequence[Shape]) -> Mapping[str, Shape]:  # noqa: ARG002
        return group.shapes

    def same(self, one: Shape, other: Shape) -> bool:
        return one == other

    def shape(self, value: Shape) -> Shape:
        return value

    def stored(self, name: str, beside: Shape | None) -> Shape:  # noqa: ARG002
        return self.trained.stored[name].shape


@dataclass(frozen=True, slots=True)
class _Tensors:
    trained: Trained

    def convert(self, group: "Group", values: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        assert self.trained.names is not None
        return self.trained.names.convert(group, values)

    def same(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        return _same(one, other)

    def shape(self, value: torch.Tensor) -> Shape:
        return tuple(value.shape)

    def stored(self, name: str, beside: torch.Tensor | None) -> torch.Tensor:
        """On the device of the tensor `beside`, since the tensors of a bucket are on one."""
        tensor = read_tensor(self.trained.stored[name], name)
        return tensor if beside is None else tensor.to(beside.device)


class _Walk(Generic[T]):
    """Goes through a trainer's tensors once. `expected`: the model's names of all that come, None where these are not
    known before. `given`: the trainer's names, by the model's. `added`: what was not given, and is as in the folder."""

    def __init__(self, trained: Trained, kind: _Kind[T], expected: frozenset[str] | None) -> None:
        self._trained, self._kind, self._expected = trained, kind, expected
        self._groups = trained.names.groups if trained.names is not None else {}
        self._tied: dict[str, tuple[str, T]] = {}  # the first to come of each that is tied
        self._parts: dict[str, T] = {}  # of what is converted together and has not come as a whole
        self._made: set[str] = set()
        self.given: dict[str, str] = {}
        self.added: list[str] = []

    def all(self, given: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        value = None
        for name, value in given:
            for made in self._take(name, value):
                self._made.add(made[0])
                yield made
        for name in sorted(self._trained.kept - self._made):
            self.added.append(name)
            yield name, self._kind.stored(name, value)

    def _take(self, name: str, value: T) -> Iterable[tuple[str, T]]:
        if (resolved := self._trained.resolve(name)) is None:
            return ()
        if (other := self.given.get(resolved)) is not None:
            both = name if other == name else f"{other} and {name} are both {resolved}"
            raise PublishError(f"the trainer named a tensor twice: {both}")
        self.given[resolved] = name
        group = self._groups.get(resolved)
        if group is None:
            return ((resolved, value),)
        if not group.renamed:
            return self._convert(group, resolved, value)
        alike = self._trained.alike(resolved)
        if len(alike) > 1:
            first = self._trained.tied_to(resolved)
            if first in self._tied:
                _require_same(self._tied[first], (name, value), self._kind.same)
                return ()
            if self._expected is None or len(alike & self._expected) > 1:  # otherwise nothing will be compared with it
                self._tied[first] = (name, value)
        return ((output, value) for output in self._trained.outputs(resolved))

    def _convert(self, group: "Group", resolved: str, value: T) -> Iterable[tuple[str, T]]:
        shape = self._kind.shape(value)
        if shape != group.sources[resolved]:
            raise PublishError(
                f"{self.given[resolved]} has shape {shape}, in the model it is {group.sources[resolved]}"
            )
        self._parts[resolved] = value
        if not group.sources.keys() <= self._parts.keys():
            return ()
        return self._kind.convert(group, [self._parts.pop(source) for source in group.sources]).items()


def shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _require_same(first: tuple[str, T], other: tuple[str, T], same: Callable[[T, T], bool]) -> None:
    if not same(first[1], other[1]):
        raise PublishError(
            f"{first[0]} and {other[0]} differ, and the model's config ties them (tie_word_embeddings): engines have "
            "one tensor for both"
        )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride():
        return True
    return one.dtype == other.dtype and torch.equal(one.detach(), other.detach().to(one.device))
