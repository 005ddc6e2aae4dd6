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
from millrace_changes import Tensors, differing, samples_of, write_changes
from millrace_words import listed
from safetensors import safe_open

from .dry_run import Description, Sent, described
from .held import addresses_of
from .recording import Memory


@dataclass(slots=True)
class Folders:
    """What is known of one model.

    sent: the tensors of the last folder. description: what this rank copies of them, found when the parameters had
    these `addresses`; a text is why that can't be said. compared: whether the parameters were found to hold a folder.
    """

    sent: tuple[Sent, ...] = ()
    description: Description | str = "no folder was read"
    addresses: Mapping[str, int] = field(default_factory=dict)
    compared: bool = False

    def take(self, model: torch.nn.Module, folder: Path, changes: Path | None) -> Mapping[str, object]:
        """Write what has changed, if there is a file of it, and compare the parameters with the folder. Return the
        answer. Raises what can't be done."""
        tensors = read_folder(folder)
        self._describe(model, tensors)
        if isinstance(self.description, str):
            if changes is not None:
                raise ValueError(self.description)
            return {"unplanned": self.description}
        if changes is not None:
            write_changes(changes, tensors, self.description.needs)
        if wrong := differing(tensors, self.description.needs):
            why = f"{listed(wrong)} do not hold what is in {folder}"
            if changes is None and not self.compared:  # SGLang may do more with weights than its loader shows
                return {"unplanned": why}
            raise ValueError(why)
        self.compared = True
        return {"samples": samples_of(tensors, self.description.needs)}

    def _describe(self, model: torch.nn.Module, tensors: Tensors) -> None:
        sent = tuple((name, one.dtype, tuple(one.shape)) for name, one in tensors.items())
        addresses = addresses_of(model.named_parameters())
        if (sent, addresses) != (self.sent, self.addresses):
            memory = Memory(model.named_parameters())
            self.description = described(getattr(model, "load_weights", None), memory, sent)
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
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a mapping
    if not tensors:
        raise ValueError(f"{folder} has no safetensors files on this host")
    return dict(sorted(tensors.items()))  # the same for every version, however its files are cut
