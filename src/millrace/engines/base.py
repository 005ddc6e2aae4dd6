"""The port to an engine: what Millrace asks of any server, in the words of the field.

An adapter turns these calls into one engine's own HTTP API. It keeps no state that the server does not have, and it
refuses (EngineRefused) what would crash or silently corrupt its server instead of passing it on.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping

from millrace.errors import EngineRefused
from millrace.types import (
    ALL_MEMORY,
    Bucket,
    EngineInfo,
    EngineLoad,
    GenerateRequest,
    Generation,
    Health,
    MemoryTag,
    PauseMode,
    ProcessGroup,
)

PUBLISHED_LORA = "millrace-"  # how the names of adapters begin that a fleet publishes


class Engine(ABC):
    """One engine behind HTTP. Every call has a deadline and raises EngineTimeout when it passes, EngineUnreachable when
    there is no connection, EngineRefused when the server says no, EngineFailed when it breaks, and LocalError when this
    process could not make the call."""

    name: str
    url: str

    @abstractmethod
    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        """Generates for at most `deadline` seconds. When that passes, or the caller is cancelled, the request is
        aborted on the server before this returns control: nothing goes on generating for nobody."""

    @abstractmethod
    def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        """As `generate`, but yields what has been generated so far each time there is more; the last one is complete,
        those before it have no reason to have ended and say ABORT. Closing it early aborts the request."""

    @abstractmethod
    async def abort(self, request_id: str | None = None) -> None:
        """Ends one request, or all of them; each comes back to its caller with its tokens and FinishReason.ABORT."""

    @abstractmethod
    async def pause(self, mode: PauseMode) -> None:
        """Stops generating. New requests wait until `resume`. Pausing a paused engine changes nothing."""

    @abstractmethod
    async def resume(self) -> None:
        """Goes on after `pause`. Resuming a running engine changes nothing."""

    @abstractmethod
    async def flush_cache(self, *, deadline: float = 30.0) -> None:
        """Forgets every cached prefix. Waits for running requests up to the deadline, then raises EngineTimeout."""

    @abstractmethod
    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        """Releases memory. Requests that run are drained first; what sleeps already stays asleep.
        The content of sleeping weights is lost: publish after waking them."""

    @abstractmethod
    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        """Takes memory back. What is awake already stays as it is."""

    async def check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:  # noqa: B027
        """Raises EngineRefused where these are not the names and shapes of all of the model's tensors, as far as that
        can be told before an update begins. One that can be rolled back need not tell."""

    @abstractmethod
    async def begin_update(self, version: int) -> None:
        """Opens the transaction that brings the weights of `version`. One at a time.

        An engine without Capability.STAGED_UPDATE generates nothing from here until `commit` or `rollback`: what runs
        is interrupted and goes on afterwards, from the tokens it has; its version spans say so."""

    @abstractmethod
    async def load(self, bucket: Bucket, *, deadline: float) -> None:
        """Reads one bucket. When this returns, the engine needs the bucket's memory no more."""

    @abstractmethod
    async def commit(self) -> None:
        """Ends the transaction: from here on the engine serves, and reports, the new version, without an adapter."""

    @abstractmethod
    async def rollback(self) -> None:
        """Drops the transaction. Raises EngineRefused where the engine can't get its old weights back; it then refuses
        to generate until a whole version was committed."""

    @abstractmethod
    async def join_group(self, group: ProcessGroup, *, deadline: float) -> None:
        """Joins a sender's process group, which ProcessGroupBuckets name. The sender must join at the same time."""

    @abstractmethod
    async def leave_group(self, name: str) -> None: ...

    @abstractmethod
    async def checksums(self) -> Mapping[str, str]:
        """Tensor name to checksum of what the engine holds: by `millrace.checksum` under the trainer's names with
        Capability.CHECKSUMS, in the engine's own way with OWN_CHECKSUMS."""

    async def sampled_checksums(self) -> Mapping[str, str]:
        """With Capability.SAMPLED_CHECKSUMS, between the last load of an update and its commit: of each tensor that it
        brought, under the sender's name, `millrace.checksum.sampled_checksums` of what the engine holds, or of what
        arrived where it holds that in another form (packed, sharded, cast)."""
        raise EngineRefused(self.name, "it makes no sampled checksums")

    async def load_lora(self, name: str, path: str, *, deadline: float = 30.0) -> None:  # noqa: ARG002
        """Loads a LoRA adapter from a folder in PEFT's format that the engine's host can read, while it generates;
        requests with `extra={"lora_path": name}` use it. Raises EngineRefused where one of that name is loaded.

        It belongs to the weights that are served: the next `commit` takes it off. Requests that
        run with it then, or name it later, use the new weights alone, and their version spans say so. `unload_lora`
        frees its memory."""
        raise EngineRefused(self.name, f"it takes no LoRA adapters ({name})")

    async def unload_lora(self, name: str, *, deadline: float = 30.0) -> None:  # noqa: ARG002
        """What runs with it goes on to its end, for which the engine may wait, or read its folder again; what names it
        later is refused, or made without it where a commit took it off."""
        raise EngineRefused(self.name, f"it takes no LoRA adapters ({name})")

    async def lora_checksums(self, name: str) -> Mapping[str, str]:
        """With Capability.CHECKSUMS: of each tensor of an adapter, by `millrace.checksum` under the trainer's names."""
        raise EngineRefused(self.name, f"it makes no checksums of adapters ({name})")

    @abstractmethod
    async def health(self, *, deadline: float = 5.0) -> Health:
        """Never raises: an engine that takes no connection is Health.DEAD, and one that this process could not ask is
        Health.UNKNOWN."""

    @abstractmethod
    async def loads(self) -> EngineLoad: ...

    @abstractmethod
    async def info(self) -> EngineInfo: ...

    @abstractmethod
    async def close(self) -> None:
        """Gives the connections back. The server goes on."""
