"""Versions that lie in a folder on the server's host: whole, or as what has changed since the version before.

SGLang itself reads a whole folder. Then this rank compares its parameters with the folder. If it holds the version
before, it can also write only what has changed: the places of all elements are known from a dry run (`dry_run`).
"""

import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from millrace_changes import Placed, Tensors
from millrace_files import mapped_tensors
from millrace_words import listed

from .dry_run import Sent, described
from .held import addresses_of
from .recording import Memory


@dataclass(slots=True)
class Folders:
    """What is known of one model.

    sent: the tensors of the last folder. placed: where this rank copies them, found when the parameters had these
    `addresses`; a text is why that can't be said. compared: whether the parameters were found to hold a folder.
    """

    sent: tuple[Sent, ...] = ()
    placed: Placed | str = "no folder was read"
    addresses: Mapping[str, int] = field(default_factory=dict)
    compared: bool = False

    def take(self, model: torch.nn.Module, folder: Path, changes: Path | None) -> Mapping[str, object]:
        """Write what has changed, if there is a file of it, and compare the parameters with the folder. Return the
        answer. Raises what can't be done."""
        tensors = read_folder(folder)
        self._describe(model, tensors)
        if isinstance(self.placed, str):
            if changes is not None:
                raise ValueError(self.placed)
            return {"unplanned": self.placed}
        if changes is not None:
            self.placed.write(changes, tensors)
        if wrong := self.placed.differing(tensors):
            why = f"{listed(wrong)} do not hold what is in {folder}"
            if changes is None and not self.compared:  # SGLang may do more with weights than its loader shows
                return {"unplanned": why}
            raise ValueError(why)
        self.compared = True
        return {"samples": self.placed.checksums(tensors)}

    def _describe(self, model: torch.nn.Module, tensors: Tensors) -> None:
        sent = tuple((name, one.dtype, tuple(one.shape)) for name, one in tensors.items())
        addresses = addresses_of(model.named_parameters())
        if (sent, addresses) != (self.sent, self.addresses):
            memory = Memory(model.named_parameters())
            found = described(getattr(model, "load_weights", None), memory, sent)
            self.placed = found if isinstance(found, str) else Placed(tensors, found.needs)
            self.sent, self.addresses = sent, addresses


OF_MODELS: "weakref.WeakKeyDictionary[torch.nn.Module, Folders]" = weakref.WeakKeyDictionary()


def answer(model: torch.nn.Module, text: str) -> Mapping[str, object]:
    """Do what an order about a folder says, and return the answer.

    text: {"folder": path} after SGLang has read the folder, or {"folder": path, "changes": path} in place of that.
    Raises what can't be done.
    """
    asked = json.loads(text)
    changes = Path(asked["changes"]) if "changes" in asked else None
    with torch.no_grad():
        return OF_MODELS.setdefault(model, Folders()).take(model, Path(asked["folder"]), changes)


def read_folder(folder: Path) -> Tensors:
    """Return the tensors of a version's folder, on the CPU and memory-mapped."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= mapped_tensors(path)[0]
    if not tensors:
        raise ValueError(f"{folder} has no safetensors files on this host")
    return dict(sorted(tensors.items()))  # the same for every version, however its files are cut
