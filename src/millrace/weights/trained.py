"""Converts a trainer's tensors to the tensors of the model's checkpoint.

Trainers wrap their models (DDP, FSDP, torch.compile, PEFT), give tied tensors once or twice, and hold experts fused, as
transformers does (`millrace.checkpoint_names`). Engines get the tensors that the model's folder has, under the names of
the folder, each once.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch

from millrace.errors import DataError, PublishError
from millrace.model_folder import StoredTensor, has_weights, stored_tensors
from millrace.weights.folder import read_tensor
from millrace.weights.source import NamedTensor, Shape, WeightSource

if TYPE_CHECKING:
    from millrace.checkpoint_names import CheckpointNames, Group

T = TypeVar("T")

# What DDP, torch.compile, FSDP, activation checkpointing and PEFT add to the names of a model's tensors. PEFT keeps the
# untrained original of each module that it trains whole (`modules_to_save`), under the name that REPLACED matches.
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

    stored: the tensors of its folder by name; empty if it has none.
    names: the conversion of the model's tensors to those of the checkpoint; None if transformers does not know the
        model.
    kept: the names of the tensors that are sent as they are in the folder if the trainer does not give them: buffers,
        and tensors that the model's class ignores.
    """

    stored: Mapping[str, StoredTensor]
    names: "CheckpointNames | None"
    kept: frozenset[str]

    def tensors(self, given: WeightSource) -> WeightSource:
        """Return the checkpoint's tensors for the trainer's tensors `given`. They are converted lazily.

        Tensors that the model does not have are passed on, and missing tensors are not added, because engines refuse
        both and name them.

        Raises PublishError if two names are one tensor, tied tensors differ, a fused tensor has another shape than in
        the model, a tensor is sharded, or a tensor belongs to an adapter. It is raised at once if the shapes are known,
        and during iteration otherwise.
        """
        shapes = given.shapes()
        if shapes is None:
            return given.converted(lambda tensors: _Walk(self, _Tensors(self), None).all(tensors))
        walk = _Walk(self, _Shapes(self), None)
        outputs = dict(walk.all(shapes.items()))
        if given.at_hand:
            self._require_sound(given)
        if walk.added:
            logger.info("tensors that the trainer did not give are sent from the model's folder: %s", shown(walk.added))
        expected = frozenset(walk.given)
        return given.converted(lambda tensors: _Walk(self, _Tensors(self), expected).all(tensors), outputs)

    def resolve(self, name: str) -> str | None:
        """Return the model's or the checkpoint's name of the trainer's tensor `name`; None if the tensor is not sent.
        Raises PublishError for a tensor of an adapter."""
        if self._knows(name):
            return name
        if ADAPTER.search(name):
            raise PublishError(
                f"{name} is a tensor of an adapter and not of the model: merge the adapter and remove its tensors "
                "(merge_and_unload does both), or publish only the adapter (publish_adapter)"
            )
        bare = WRAPPERS.sub("", name)
        needless = REPLACED.search(name) or (self.names is not None and self.names.passes_over(bare))
        return None if needless and not self._knows(bare) else bare

    def _knows(self, name: str) -> bool:
        return name in self.stored or (self.names is not None and name in self.names.groups)

    def tied_to(self, name: str) -> str:
        """Return the name of the tensor that it is tied to; `name` itself if it is not tied."""
        return self.names.tied.get(name, name) if self.names is not None else name

    def alike(self, name: str) -> set[str]:
        """Return the model's names of this tensor and of those that are tied to it."""
        tied = self.names.tied if self.names is not None else {}
        first = self.tied_to(name)
        return {first, *(target for target, source in tied.items() if source == first)}

    def outputs(self, name: str) -> list[str]:
        """Return the checkpoint's names of a tensor that is only renamed. A tied tensor gets every name that it has in
        the folder."""
        assert self.names is not None
        groups = self.names.groups
        names = [output for tied in sorted(self.alike(name)) for output in groups[tied].names]
        return [output for output in names if output in self.stored] or list(groups[self.tied_to(name)].names)

    def _require_sound(self, given: Iterable[NamedTensor]) -> None:
        """Raise PublishError if a tensor is sharded, or if tied tensors differ. The tensors exist already, so this is
        checked before anything is sent."""
        alike: dict[str, list[NamedTensor]] = {}
        for name, tensor in given:
            if hasattr(tensor, "full_tensor"):
                raise PublishError(
                    f"{name} is sharded over the trainer's ranks, and all of them must take part in gathering it; "
                    "publish millrace.weights.sharded.ShardedTensors (docs/weights.md)"
                )
            if (resolved := self.resolve(name)) is not None:
                alike.setdefault(self.tied_to(resolved), []).append((name, tensor))
        for first, *others in alike.values():
            for other in others:
                _require_same(first, other, _same)


def read_trained(folder: Path) -> Trained:
    """Return the model in `folder`. If the folder is not on this host, only the wrappers' prefixes are removed from
    names.

    Raises DataError if the folder's weights are damaged, and PublishError if it has a tied tensor twice with different
    values.
    """
    if not (folder / "config.json").is_file():
        return Trained({}, None, frozenset())
    from millrace.checkpoint_names import read_names  # imports transformers

    stored = stored_tensors(folder) if has_weights(folder) else {}
    try:
        names = read_names(folder, stored.keys() or None)
    except DataError as error:
        logger.info("tensors are sent to the engines under the trainer's names: %s", error)
        return Trained(stored, None, frozenset())
    buffers = {name for buffer in names.buffers for name in names.groups[buffer].names}
    outputs = {name for group in names.groups.values() for name in group.names}
    kept = frozenset(name for name in stored if name in buffers or (name not in outputs and names.passes_over(name)))
    for target, source in names.tied.items():
        both = [name for tied in (source, target) for name in names.groups[tied].names if name in stored]
        if len(both) == 2 and not _same(*(read_tensor(stored[name], name) for name in both)):
            raise PublishError(
                f"{both[0]} and {both[1]} differ in {folder}, whose config ties them (tie_word_embeddings): engines "
                "would use only one of them; set tie_word_embeddings to false there, or remove one of the tensors"
            )
    return Trained(stored, names, kept)


class _Kind(Protocol[T]):
    """The operations of a walk on its values, which are tensors or only their shapes."""

    def convert(self, group: "Group", values: Sequence[T]) -> Mapping[str, T]: ...

    def same(self, first: T, other: T) -> bool: ...

    def shape(self, value: T) -> Shape: ...

    def stored(self, name: str, beside: T | None) -> T: ...


@dataclass(frozen=True, slots=True)
class _Shapes:
    """A walk over shapes."""

    trained: Trained

    def convert(self, group: "Group", values: Sequence[Shape]) -> Mapping[str, Shape]:  # noqa: ARG002
        return group.shapes

    def same(self, first: Shape, other: Shape) -> bool:
        return first == other

    def shape(self, value: Shape) -> Shape:
        return value

    def stored(self, name: str, beside: Shape | None) -> Shape:  # noqa: ARG002
        return self.trained.stored[name].shape


@dataclass(frozen=True, slots=True)
class _Tensors:
    """A walk over tensors."""

    trained: Trained

    def convert(self, group: "Group", values: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        assert self.trained.names is not None
        return self.trained.names.convert(group, values)

    def same(self, first: torch.Tensor, other: torch.Tensor) -> bool:
        return _same(first, other)

    def shape(self, value: torch.Tensor) -> Shape:
        return tuple(value.shape)

    def stored(self, name: str, beside: torch.Tensor | None) -> torch.Tensor:
        """Return the folder's tensor, on the device of `beside`, because all tensors of a bucket are on one device."""
        tensor = read_tensor(self.trained.stored[name], name)
        return tensor if beside is None else tensor.to(beside.device)


class _Walk(Generic[T]):
    """One pass over a trainer's tensors.

    expected: the model's names of all tensors that come; None if they are not known in advance.
    given: the trainer's names of the tensors so far, by the model's names.
    added: the names of the tensors that were not given and are read from the folder.
    """

    def __init__(self, trained: Trained, kind: _Kind[T], expected: frozenset[str] | None) -> None:
        self._trained, self._kind, self._expected = trained, kind, expected
        self._groups = trained.names.groups if trained.names is not None else {}
        self._tied: dict[str, tuple[str, T]] = {}  # the first of each set of tied tensors
        self._parts: dict[str, T] = {}  # tensors of groups that are still incomplete
        self._yielded: set[str] = set()
        self.given: dict[str, str] = {}
        self.added: list[str] = []

    def all(self, given: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """Yield the checkpoint's tensors."""
        value = None
        for name, value in given:
            for output in self._convert(name, value):
                self._yielded.add(output[0])
                yield output
        for name in sorted(self._trained.kept - self._yielded):
            self.added.append(name)
            yield name, self._kind.stored(name, value)

    def _convert(self, name: str, value: T) -> Iterable[tuple[str, T]]:
        """Return the checkpoint's tensors that this tensor completes."""
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
            return self._convert_group(group, resolved, value)
        alike = self._trained.alike(resolved)
        if len(alike) > 1:
            first = self._trained.tied_to(resolved)
            if first in self._tied:
                _require_same(self._tied[first], (name, value), self._kind.same)
                return ()
            if self._expected is None or len(alike & self._expected) > 1:  # otherwise no tied tensor will follow
                self._tied[first] = (name, value)
        return ((output, value) for output in self._trained.outputs(resolved))

    def _convert_group(self, group: "Group", resolved: str, value: T) -> Iterable[tuple[str, T]]:
        shape = self._kind.shape(value)
        if shape != group.sources[resolved]:
            raise PublishError(
                f"{self.given[resolved]} has shape {shape}, but in the model it is {group.sources[resolved]}"
            )
        self._parts[resolved] = value
        if not group.sources.keys() <= self._parts.keys():
            return ()
        return self._kind.convert(group, [self._parts.pop(source) for source in group.sources]).items()


def shown(names: Sequence[str]) -> str:
    """Return the first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _require_same(first: tuple[str, T], other: tuple[str, T], same: Callable[[T, T], bool]) -> None:
    if not same(first[1], other[1]):
        raise PublishError(
            f"{first[0]} and {other[0]} differ, but the model's config ties them (tie_word_embeddings): engines have "
            "one tensor for both"
        )


def _same(first: torch.Tensor, other: torch.Tensor) -> bool:
    if first.is_meta:  # all of them have the address 0
        in_one_place = first.untyped_storage()._cdata == other.untyped_storage()._cdata
    else:
        in_one_place = first.data_ptr() == other.data_ptr()
    if in_one_place and first.shape == other.shape and first.stride() == other.stride():
        return True
    return first.dtype == other.dtype and torch.equal(first.detach(), other.detach().to(first.device))
