"""The audit of a publish: what each engine really holds, layer by layer, and how far it is from the trainer's weights.

While the tensors are sent, some elements of each matrix are kept, before anything quantises them. After the load and
before the commit, each engine compares them with its layers (`millrace.engines.audit`). A layer that is in another form
than was asked for, or too far from what was sent, is an error of the engine.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from millrace.engines.audit import HeldLayer, WeightSample
from millrace.engines.base import Engine
from millrace.engines.experts import TENSOR
from millrace.model_folder import CASTABLE
from millrace.quantisation import Quantisation
from millrace.types import Capability, EngineInfo
from millrace.weights.source import NamedTensor, WeightSource

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ROWS, COLUMNS = 64, 16  # of a matrix that are compared
EXPERTS = 4  # of a layer, other ones in each publish


@dataclass(frozen=True, slots=True)
class SentAs:
    """The tensor that engines get for a matrix. packed: how many weights one of its elements has."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    packed: int = 1


@dataclass(frozen=True, slots=True)
class EngineAudit:
    """What an engine holds after a publish.

    asked: how its layers should be quantised; None if nothing asks for it. layers: what it holds. unaudited: matrices
    that it could not find in its layers.
    """

    asked: Quantisation | None
    layers: tuple[HeldLayer, ...]
    unaudited: tuple[str, ...] = ()

    @property
    def fault(self) -> str | None:
        """One line on the first layer that is wrong; None if all are sound."""
        faults = self.faults()
        more = f" (and {len(faults) - 1} more layers)" if len(faults) > 1 else ""
        return f"its layer {faults[0]}{more}" if faults else None

    def faults(self) -> list[str]:
        """Return what is wrong with layers, one line for each."""
        found = []
        for one in self.layers:
            if self.asked is not None and self.asked.covers(one.tensor) and not self.asked.admits(one.form):
                found.append(f"{one.layer} is {one.form}, and {self.asked} was asked for")
            elif one.error is not None and not one.error <= one.form.bound:
                found.append(
                    f"{one.layer}, in {one.form}, is {one.error:.3g} away from the trainer's weights, where at most "
                    f"{one.form.bound:g} is plausible"
                )
        if not found and self.asked is not None and self.layers and all(one.form.bits >= 16 for one in self.layers):
            first = next((one for one in self.layers if "_proj" in one.tensor), self.layers[0])
            found.append(f"{first.layer} is {first.form}, as are all others, and {self.asked} was asked for")
        return found

    def __str__(self) -> str:
        """One line for each form, with the number of its layers and their errors."""
        lines = []
        for form, count in Counter(one.form for one in self.layers).most_common():
            alike = [one for one in self.layers if one.form == form]
            errors = [(one.error, one.layer) for one in alike if one.error is not None]
            if not errors:
                lines.append(f"{count} layers {form}, not measured ({alike[0].note})")
                continue
            mean, (worst, layer) = sum(error for error, _ in errors) / len(errors), max(errors)
            lines.append(f"{count} layers {form}: error {mean:.4f}, at most {worst:.4f} ({layer})")
            if len(errors) < count:
                lines[-1] += f", {count - len(errors)} not measured"
        if self.unaudited:
            lines.append(f"{len(self.unaudited)} matrices not found, such as {self.unaudited[0]}")
        return "; ".join(lines)


async def audited(
    engine: Engine, info: EngineInfo, samples: Sequence[WeightSample], *, deadline: float
) -> EngineAudit | None:
    """Ask an engine with an open update what its layers hold. None if it can't say. Raises as `Engine.audit` does."""
    if not samples or Capability.AUDIT not in info.capabilities:
        return None
    held = await engine.audit(samples, deadline=deadline)
    if held is None:
        return None
    layers, unplaced = held
    return EngineAudit(info.quantisation, tuple(layers), tuple(samples[number].name for number in unplaced))


def samples_for(version: int, infos: Mapping[str, EngineInfo]) -> "Samples | None":
    """Return what keeps samples of a publish to these engines; None if none of them should quantise.

    infos: by the engine's name.
    """
    quantising = {name: info for name, info in infos.items() if info.quantisation is not None}
    for name, info in quantising.items():
        if Capability.AUDIT not in info.capabilities:
            logger.warning(
                "%s should quantise (%s), and without Millrace's loader it can't say what its layers hold",
                name,
                info.quantisation,
            )
    return Samples(version) if quantising else None


@dataclass(slots=True)
class Samples:
    """Keeps elements of each matrix that passes.

    version: of the publish; it selects places and experts. sent: what engines get for a matrix, for those that are
    quantised before. experts: of a layer.
    """

    version: int
    sent: Mapping[str, SentAs] = field(default_factory=dict)
    experts: int = 0
    _kept: dict[str, WeightSample] = field(default_factory=dict)

    def keep(self, source: WeightSource) -> WeightSource:
        """Return the same tensors. Elements of each are kept when it is taken."""

        def as_they_come(tensors: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
            for name, tensor in tensors:
                self._keep(name, tensor)
                yield name, tensor

        return source.converted(as_they_come)

    def all(self) -> Sequence[WeightSample]:
        """Return what was kept."""
        return list(self._kept.values())

    def _keep(self, name: str, tensor: "torch.Tensor") -> None:
        import torch

        own = str(tensor.dtype).removeprefix("torch.")
        if tensor.dim() != 2 or own not in CASTABLE or not self._chosen(name):
            return
        height, width = tensor.shape
        rows, columns = spread(height, ROWS, 0), spread(width, COLUMNS, self.version)
        found = tensor.detach()[torch.tensor(rows, device=tensor.device)]
        found = found[:, torch.tensor(columns, device=tensor.device)].to(torch.bfloat16).contiguous().cpu()
        sent = self.sent.get(name) or SentAs(name, own, (height, width))
        values = found.view(torch.uint8).numpy().tobytes()
        self._kept[name] = WeightSample(sent.name, sent.dtype, sent.shape, sent.packed, rows, columns, values)

    def _chosen(self, name: str) -> bool:
        """Return whether a tensor is compared. Of a layer's experts, each publish chooses a few."""
        found = TENSOR.search(name)
        if found is None or found[2] is None:
            return True
        return (int(found[2]) - self.version) % max(1, self.experts // EXPERTS) == 0


def experts_in(names: Iterable[str]) -> int:
    """Return the number of experts of a layer, by the names of a model's tensors; 0 if they have no numbers."""
    numbers = [int(found[2]) for name in names if (found := TENSOR.search(name)) and found[2] is not None]
    return max(numbers, default=-1) + 1


def spread(size: int, count: int, shift: int) -> tuple[int, ...]:
    """Return at most `count` different numbers below `size`, evenly spread. `shift` moves all of them."""
    count = min(size, count)
    return tuple(sorted({(number * size // count + shift) % size for number in range(count)})) if count else ()
