"""The public names: each is documented, and so is every type that their signatures mention."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import millrace
from millrace import errors

ROOT = Path(__file__).parent.parent
PACKAGES = ["millrace", "millrace.rollout", "millrace.serve", "millrace.train", "millrace.weights"]
# What only those meet who write an adapter, a transport or a policy of their own (docs/architecture.md).
INTERNAL = {
    "Asked", "Calls", "ChatTemplate", "CudaIpcBucket", "DiskBucket", "Dtypes", "Entry", "EnvironmentKind",
    "JudgeCounts", "PartsBucket", "PeerBucket", "Player", "ProcessGroup", "ProcessGroupBucket", "Publishing",
    "Reasoning", "SentPartsBucket", "SharedMemoryBucket", "StandInTurn", "TensorSpec", "TorchStorageBucket", "Vision",
    "WeightSample", "Why",
}  # fmt: skip


def public() -> dict[str, object]:
    """All public names of the packages, with their objects."""
    loaded = [importlib.import_module(name) for name in PACKAGES]
    return {name: getattr(module, name) for module in loaded for name in module.__all__ if name[0] != "_"}


def mentioned(annotation: object) -> Iterator[type]:
    """The classes of Millrace in an annotation."""
    for part in typing.get_args(annotation):
        yield from mentioned(part)
    if isinstance(annotation, type) and annotation.__module__.startswith("millrace"):
        yield annotation


def signatures(value: Any) -> Iterator[tuple[str, object]]:
    """A function, or the constructor and the public methods and properties of a class."""
    if not isinstance(value, type):
        yield value.__name__, value
        return
    if dataclasses.is_dataclass(value):
        yield value.__name__, value
    for name, member in inspect.getmembers(value):
        found = member.fget if isinstance(member, property) else member
        if name[0] != "_" and inspect.isroutine(found) and (getattr(found, "__module__", "") or "")[:8] == "millrace":
            yield f"{value.__name__}.{name}", inspect.unwrap(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_can_be_imported_and_is_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(dir(module))
    for name in set(module.__all__) - {"__version__"}:
        value = getattr(module, name)
        if isinstance(value, type) or inspect.isroutine(value):
            assert inspect.getdoc(value), f"{package}.{name} has no docstring"
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_every_error_is_public() -> None:
    own = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert own <= set(millrace.__all__)


def test_every_type_in_a_public_signature_is_public() -> None:
    known = set(public()) | INTERNAL
    missing: dict[str, str] = {}
    for value in public().values():
        if not isinstance(value, type) and not inspect.isroutine(value):
            continue
        for where, signature in signatures(value):
            try:
                hints = typing.get_type_hints(signature)
            except NameError:  # names torch, which is imported for type checking only
                continue
            for hint in hints.values():
                missing |= {found.__name__: where for found in mentioned(hint) if found.__name__ not in known}
    assert sorted(missing) == []


def test_the_reference_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools/api_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
