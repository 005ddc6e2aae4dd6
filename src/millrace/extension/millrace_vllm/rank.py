"""One rank of the server: its weights, and the transports that bring buckets to it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from millrace_receiving import ReceivingGroup
from millrace_words import first_line, listed

from .audit import audit
from .digest import StoredTensors
from .errors import RpcError
from .folders import Folders
from .layouts import Layout, layout_of
from .messages import TensorSpec, parse_group, parse_parts, parse_specs, take
from .parts import Needs, NotPlainError
from .plan import Plan, Target
from .receive import mapped_file, opened_ipc
from .weights import Weights
from .writing import Writer


class Rank:
    """The state that the extension keeps in one worker.

    planned: how many layouts of buckets were planned since the start; all other buckets replayed one of them."""

    def __init__(self, model: torch.nn.Module, config: Any, device: torch.device, rank: int) -> None:
        parallel = config.parallel_config
        shards = parallel.tensor_parallel_size * parallel.data_parallel_size
        self._plan = Plan(model, config.model_config.dtype, shards)
        self._writer = Writer(model, config, device, self._plan)
        self._config = config
        self.rank = parallel.data_parallel_index * parallel.world_size + rank
        self.weights = Weights(self._plan, self._writer)
        self.stored = StoredTensors(self._plan.modules)
        self._folders = Folders(self._plan, self._writer, self.weights, device)
        self.planned = 0
        self._quantised = str(config.model_config.quantization) if config.quant_config is not None else None
        self._needs: Needs | None = None
        self._layouts: dict[str, Layout] = {}  # of the last two updates that came in buckets
        self._used: set[str] = set()  # by the last one
        self._device = device
        self._receiving: ReceivingGroup | None = None  # the process group by which buckets come

    def join(self, body: dict[str, Any]) -> None:
        """Become a member of a process group. It ends the membership of another one."""
        group = parse_group(body, self.rank)
        if self._receiving is not None:
            self._receiving.close()
            self._receiving = None
        try:
            self._receiving = ReceivingGroup(group)
        except RuntimeError as error:  # torch's DistError is one
            place = f"{group.address}:{group.port}"
            raise RpcError(f"could not join group {group.name} at {place}: {first_line(error)}") from error

    def leave(self, name: str) -> None:
        self._group(name).close()
        self._receiving = None

    def _group(self, name: str) -> ReceivingGroup:
        if self._receiving is None or self._receiving.group.name != name:
            raise RpcError(f"no group {name} has been joined; join it first")
        return self._receiving

    def begin(self) -> None:
        """Open an update."""
        self.weights.begin()
        if self._used:
            self._layouts = {text: layout for text, layout in self._layouts.items() if text in self._used}
            self._used.clear()

    def load(self, bucket: dict[str, Any], tensors: str) -> dict[str, Any]:
        """Load a bucket. `tensors`: what it contains, as JSON. Returns what `Extension.millrace_load` answers."""
        if bucket.get("begin") is True:
            self.begin()
        self.weights.open_update()
        kind = take(bucket, "kind", str)
        if kind == "disk":
            return self._folders.load(bucket)
        if kind not in ("shared_memory", "cuda_ipc", "process_group"):
            raise RpcError(f"unknown kind of bucket: {kind}")
        if kind == "cuda_ipc":
            bucket["share"] = self._own(take(bucket, "shares", list))
        layout = self._layout(tensors, self._planned)
        samples = self.weights.load(layout, self._fetching(kind, bucket))
        return {"samples": samples, "ignored": listed(layout.ignored)}

    def needs(self, tensors: str) -> dict[str, Any]:
        """Return what `Extension.millrace_needs` answers."""
        self._layouts.clear()
        self._needs = None
        if self._quantised is not None:
            return {"unplanned": f"its layers are quantised ({self._quantised})"}
        specs = parse_specs(tensors)
        try:
            self._needs = needs = Needs(specs, self._plan.targets(specs), self._writer.processed_last)
        except NotPlainError as error:
            return {"unplanned": str(error)}
        return {"boxes": [needs.boxes(spec.name) for spec in specs]}

    def load_parts(self, bucket: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
        """Load a bucket of parts. Returns what `Extension.millrace_load_parts` answers."""
        if bucket.get("begin") is True:
            self.begin()
        self.weights.open_update()
        place = {**self._own(take(bucket, "ranks", list)), "seconds": bucket.get("seconds")}
        kind = take(place, "kind", str)
        if kind not in ("shared_memory", "cuda_ipc", "process_group"):
            raise RpcError(f"parts can't come in a bucket of kind {kind}")
        if len(parts) <= self.rank:
            raise RpcError(f"the bucket has parts for {len(parts)} ranks, and none for rank {self.rank}")
        layout = self._layout(parts[self.rank], self._planned_parts)
        return {"samples": self.weights.load(layout, self._fetching(kind, place))}

    def _own(self, ranks: list[Any]) -> dict[str, Any]:
        """What a bucket has for this rank."""
        if self.rank >= len(ranks) or not isinstance(ranks[self.rank], dict):
            raise RpcError(f"the bucket is for {len(ranks)} ranks, and has nothing for rank {self.rank}")
        own: dict[str, Any] = ranks[self.rank]
        return own

    def audit(self, samples: str) -> dict[str, Any]:
        """Compare what the layers hold with samples of the trainer's weights, given as JSON."""
        return audit(samples, self._plan, self._config)

    def _fetching(self, kind: str, bucket: dict[str, Any]) -> Callable[[], torch.Tensor]:
        """What returns the bytes of a bucket."""
        if kind == "shared_memory":
            path = take(bucket, "path", str)
            return lambda: mapped_file(path).to(self._device)
        if kind == "cuda_ipc":
            share, nbytes = take(bucket, "share", dict), take(bucket, "nbytes", int)
            return lambda: opened_ipc(share, nbytes, self._device)
        group = self._group(take(bucket, "group", str))
        number, seconds = take(bucket, "number", int), take(bucket, "seconds", int, float)
        return lambda: self._received(group, number, seconds)

    def _received(self, group: ReceivingGroup, number: int, seconds: float) -> torch.Tensor:
        """The bytes of a bucket that a sender broadcasts."""
        try:
            arrived: torch.Tensor = group.bucket(number, seconds)
        except RuntimeError as error:
            raise RpcError(str(error)) from error
        return arrived.to(self._device)

    def _layout(self, text: str, plan: Callable[[str], Layout]) -> Layout:
        """What a bucket with these tensors does to the model. It is planned once, and again if the model has moved."""
        layout = self._layouts.get(text)
        if layout is None or not layout.fits:
            layout = self._layouts[text] = plan(text)
            self.planned += 1
        self._used.add(text)
        return layout

    def _planned(self, text: str) -> Layout:
        specs = parse_specs(text)
        return self._layout_of(specs, self._plan.targets(specs))

    def _planned_parts(self, text: str) -> Layout:
        if self._needs is None:
            raise RpcError("this rank has not said which parts it needs")
        parts = parse_parts(text)
        layout = self._layout_of(self._needs.specs(parts), self._needs.targets(parts))
        layout.due = self._needs.modules
        return layout

    def _layout_of(self, specs: Sequence[TensorSpec], targets: Sequence[Target]) -> Layout:
        return layout_of(specs, targets, self._plan, self._writer.in_place, self._writer.processed_last)
