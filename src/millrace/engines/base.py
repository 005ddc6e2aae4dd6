"""The engine port: the calls that Millrace makes on any inference server.

An adapter implements these calls with one engine's HTTP API. It raises EngineRefused instead of sending a call that
would crash the server or silently corrupt its output. Stock SGLang and vLLM do not check calls against their state, so
their adapters track the state. Nothing else may then control the server.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence

from millrace.buckets import Bucket, PeerBucket, ProcessGroup, TensorSpec
from millrace.engines.audit import HeldLayer, WeightSample
from millrace.errors import EngineRefused
from millrace.types import ALL_MEMORY, EngineInfo, EngineLoad, GenerateRequest, Generation, Health, MemoryTag, PauseMode

PUBLISHED_LORA = "millrace-"  # prefix of the names of LoRA adapters that a fleet publishes


class Engine(ABC):
    """One inference server.

    Every call has a deadline. Deadlines are durations in seconds, counted from the call. Every call except `health` can
    raise these errors.

    Raises:
        EngineTimeout: the deadline passed.
        EngineUnreachable: no connection to the server.
        EngineRefused: the server, or the adapter on its behalf, refused the call.
        EngineFailed: the server failed, or its answer could not be understood.
        LocalError: this process could not make the call. The engine is not at fault.

    Example:

        request = GenerateRequest(input_ids=(1, 2, 3), sampling=SamplingParams(max_new_tokens=16))
        generation = await engine.generate(request, deadline=60.0)
        print(generation.output_ids, generation.finish_reason)
    """

    name: str
    url: str

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} at {self.url}>"

    @abstractmethod
    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        """Generate the completion of one prompt.

        If the deadline passes or the caller is cancelled, the request is aborted on the server before this call ends.

        Returns:
            The output tokens, their logprobs, and the weight version that produced each of them.

        Raises:
            NonFiniteLogprobs: a logprob is NaN or infinite. The weights are at fault, not the engine.
        """

    @abstractmethod
    def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        """Like `generate`, but yields the cumulative output as it grows.

        Only the last item is final. Closing the stream aborts the request. The `finish_reason` of every item before
        the last is ABORT.
        """

    @abstractmethod
    async def abort(self, request_id: str | None = None) -> None:
        """Abort one request, or all requests if `request_id` is None.

        The aborted `generate` call returns the tokens made so far, with FinishReason.ABORT.
        """

    @abstractmethod
    async def pause(self, mode: PauseMode) -> None:
        """Stop generating. New requests wait until `resume`.

        Pausing a paused engine has no effect.
        """

    @abstractmethod
    async def resume(self) -> None:
        """Continue after `pause`. Resuming a running engine has no effect."""

    @abstractmethod
    async def flush_cache(self, *, deadline: float = 30.0) -> None:
        """Drop every cached prefix, after the running requests have ended.

        Raises:
            EngineTimeout: requests still ran at the deadline.
        """

    @abstractmethod
    async def sleep(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        """Release memory, after the running requests have ended.

        Memory that is already released stays released. Released weights lose their content: publish after `wake`.
        """

    @abstractmethod
    async def wake(self, what: frozenset[MemoryTag] = ALL_MEMORY) -> None:
        """Allocate memory that `sleep` released. Memory that is not released stays as it is."""

    async def check_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> None:  # noqa: B027
        """Check, before an update, the names and shapes of all tensors that it will bring.

        An engine that can roll back an update may check later, during the update.

        Raises:
            EngineRefused: they are not the names and shapes of the model's tensors, or some are missing.
        """

    @abstractmethod
    async def begin_update(self, version: int) -> None:
        """Open the transaction that brings the weights of `version`. Only one can be open.

        With Capability.STAGED_UPDATE, the engine keeps generating. Without it, the engine generates nothing until
        `commit` or `rollback`: running requests are interrupted and then continue from the tokens that they have. Their
        version spans show which weights produced which tokens.
        """

    @abstractmethod
    async def load(self, bucket: Bucket, *, deadline: float) -> None:
        """Read one bucket of tensors. The caller may reuse the bucket's memory when this returns."""

    async def offer_weights(self, names: Sequence[str]) -> PeerBucket:  # noqa: ARG002
        """Offer tensors that are served, by the names of an update, to another engine, which loads them as the bucket.

        Needs Capability.UPDATE_FROM_PEER. The engine serves meanwhile.
        """
        raise EngineRefused(self.name, "it does not give its weights to other engines")

    async def needed_parts(
        self,
        tensors: Sequence[TensorSpec],  # noqa: ARG002
        *,
        deadline: float,  # noqa: ARG002
        group: str | None = None,  # noqa: ARG002
    ) -> Sequence[Sequence[Sequence[tuple[tuple[int, int], ...]]]]:
        """Return, for each rank and each of the tensors, the parts of it that the rank needs, as boxes that do not
        overlap: the start and the end along each dimension.

        Needs Capability.UPDATE_FROM_PARTS. No update may be open. The engine may interrupt its requests for it, which
        then continue, as for an update. It remembers the answer to the last question. After it, PartsBuckets of these
        tensors can be loaded in updates.

        tensors: all tensors of an update. Their offsets mean nothing. group: the name of a process group of several
            senders that the engine has joined (`ProcessGroup`). Its ranks then answer in the group's store, and begin
            to receive; SentPartsBuckets can be loaded. This needs Capability.SENT_PARTS.

        Raises:
            EngineRefused: the engine loads its weights in another way than by copying parts of them.
        """
        raise EngineRefused(self.name, "it takes no parts of tensors")

    @abstractmethod
    async def commit(self) -> None:
        """End the transaction: the engine now serves and reports the new version, without LoRA adapters."""

    @abstractmethod
    async def rollback(self) -> None:
        """Drop the transaction.

        Raises:
            EngineRefused: the old weights are partly overwritten. The engine refuses to generate until a whole version
                is committed.
        """

    @abstractmethod
    async def join_group(self, group: ProcessGroup, *, deadline: float) -> None:
        """Join a sender's process group, by which ProcessGroupBuckets arrive. The sender must join at the same time."""

    @abstractmethod
    async def leave_group(self, name: str) -> None:
        """Leave the process group called `name`."""

    @abstractmethod
    async def checksums(self) -> Mapping[str, str]:
        """Return the checksum of each tensor that the engine holds, by tensor name.

        With Capability.CHECKSUMS these are values of `millrace.checksum`, under the trainer's names. With OWN_CHECKSUMS
        both names and values are the engine's own.
        """

    async def sampled_checksums(self) -> Mapping[str, str]:
        """Return a sampled checksum of each tensor of the open update, under the sender's names.

        Needs Capability.SAMPLED_CHECKSUMS. Call it after the last `load` and before `commit`. The values are those of
        `millrace.checksum.sampled_checksums`, of the tensor that the engine holds. If the engine holds it in another
        form (packed, sharded, cast), they are of the tensor that arrived. Empty if the engine makes none for an update
        that came in this way.
        """
        raise EngineRefused(self.name, "it makes no sampled checksums")

    async def audit(
        self,
        samples: Sequence[WeightSample],  # noqa: ARG002
        *,
        deadline: float,  # noqa: ARG002
    ) -> tuple[Sequence[HeldLayer], Sequence[int]] | None:
        """Compare what the layers hold with samples of the trainer's weights.

        Needs Capability.AUDIT. Call it after the last `load` and before `commit`.

        Returns:
            The layers, and the numbers of the samples that no layer holds. None if the server is on another host and
            can't be asked there.
        """
        raise EngineRefused(self.name, "it can't say what its layers hold")

    async def load_lora(self, name: str, path: str, *, deadline: float = 30.0) -> None:  # noqa: ARG002
        """Load a LoRA adapter from a folder in PEFT's format, while the engine generates.

        The engine's host must be able to read `path`. Requests with `extra={"lora_path": name}` use the adapter.

        The adapter belongs to the weights that are served now. The next `commit` detaches it: requests that run with
        it or name it later use the new weights alone, and their version spans show that. `unload_lora` frees its
        memory.

        Raises:
            EngineRefused: an adapter of that name is loaded, or the engine has no Capability.LORA.
        """
        raise EngineRefused(self.name, f"it takes no LoRA adapters ({name})")

    async def unload_lora(self, name: str, *, deadline: float = 30.0) -> None:  # noqa: ARG002
        """Unload a LoRA adapter.

        Requests that run with it continue to their end. The engine may wait for them, or read the folder again.
        A later request that names the adapter is refused, or is served without it if a commit had detached it.
        """
        raise EngineRefused(self.name, f"it takes no LoRA adapters ({name})")

    async def lora_checksums(self, name: str) -> Mapping[str, str]:
        """Return the `millrace.checksum` of each tensor of a loaded LoRA adapter, under the trainer's names.

        Needs Capability.CHECKSUMS.
        """
        raise EngineRefused(self.name, f"it makes no checksums of adapters ({name})")

    @abstractmethod
    async def health(self, *, deadline: float = 5.0) -> Health:
        """Return the state of the engine. Never raises.

        Health.DEAD: the engine accepts no connection or fails. Health.BUSY: it did not answer by the deadline.
        Health.UNKNOWN: this process could not ask it.
        """

    @abstractmethod
    async def loads(self) -> EngineLoad:
        """Return the current load: requests, used KV cache in tokens, tokens per second."""

    @abstractmethod
    async def info(self) -> EngineInfo:
        """Return what the engine serves and what it can do."""

    @abstractmethod
    async def close(self) -> None:
        """Close the connections. The server keeps running."""
