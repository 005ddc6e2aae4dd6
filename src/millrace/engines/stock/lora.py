"""The LoRA adapters of a stock server, and the rewriting of requests that name one. Pure."""

from dataclasses import dataclass, field, replace

from millrace.engines.stock.state import InvalidStateError
from millrace.types import GenerateRequest

LORA = "lora_path"  # in a request's extra


@dataclass(slots=True)
class LoadedLoras:
    """The LoRA adapters that were loaded into one server.

    loaded: name to the workers' own id of the adapter, or None. detached: adapters that the last commit detached,
    because it replaced the weights under them. unloaded: adapters that were unloaded; SGLang would silently load one
    again for a request that names it.
    """

    loaded: dict[str, int | None] = field(default_factory=dict)
    detached: frozenset[str] = frozenset()
    unloaded: set[str] = field(default_factory=set)

    def book(self, name: str, worker_id: int | None) -> None:
        self.loaded[name] = worker_id
        self.detached -= {name}
        self.unloaded.discard(name)

    def unbook(self, name: str) -> int | None:
        """Remove an adapter. Return the workers' own id of it."""
        if name not in self.detached:
            self.unloaded.add(name)
        return self.loaded.pop(name, None)

    def detach_all(self) -> None:
        self.unloaded |= self.detached
        self.detached = frozenset(self.loaded)
        self.unloaded -= self.detached

    def served(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request without a detached adapter. Raises InvalidStateError for an unloaded one."""
        name = request.extra.get(LORA)
        if name in self.unloaded:
            raise InvalidStateError(f"the LoRA adapter {name} was unloaded")
        if name not in self.detached:
            return request
        return replace(request, extra={key: value for key, value in request.extra.items() if key != LORA})
