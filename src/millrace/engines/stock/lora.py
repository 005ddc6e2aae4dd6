"""The LoRA adapters that a stock server was told to load, and what becomes of requests that name one. Pure."""

from dataclasses import dataclass, field, replace

from millrace.engines.stock.state import InvalidStateError
from millrace.types import GenerateRequest

LORA = "lora_path"  # in a request's extra


@dataclass(slots=True)
class LoadedLoras:
    """loaded: by the name, and what the server's workers call it where they have another one. detached: by the last
    commit, which made the weights under them others. unloaded: on request; SGLang would load such a one again, without
    a word, for a request that names it."""

    loaded: dict[str, int | None] = field(default_factory=dict)
    detached: frozenset[str] = frozenset()
    unloaded: set[str] = field(default_factory=set)

    def book(self, name: str, worker_id: int | None) -> None:
        self.loaded[name] = worker_id
        self.detached -= {name}
        self.unloaded.discard(name)

    def unbook(self, name: str) -> int | None:
        """Returns what the workers call it."""
        if name not in self.detached:
            self.unloaded.add(name)
        return self.loaded.pop(name, None)

    def detach_all(self) -> None:
        self.unloaded |= self.detached
        self.detached = frozenset(self.loaded)
        self.unloaded -= self.detached

    def served(self, request: GenerateRequest) -> GenerateRequest:
        """The request as it is sent: without an adapter that was taken off. Raises InvalidStateError for one that was
        unloaded."""
        name = request.extra.get(LORA)
        if name in self.unloaded:
            raise InvalidStateError(f"the adapter {name} was unloaded")
        if name not in self.detached:
            return request
        return replace(request, extra={key: value for key, value in request.extra.items() if key != LORA})
