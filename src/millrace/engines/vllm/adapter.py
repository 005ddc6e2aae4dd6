"""The adapter for stock vLLM."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from millrace.buckets import Bucket, DiskBucket, ProcessGroup, ProcessGroupBucket, TensorSpec
from millrace.engines.audit import HeldLayer, WeightSample
from millrace.engines.http_engine import ABORT_DEADLINE, IDLE_POLL_SECONDS, MEMORY_DEADLINE
from millrace.engines.stock.engine import StockEngine
from millrace.engines.stock.parts import NeededParts
from millrace.engines.stock.state import InvalidStateError, ServerState, require
from millrace.engines.stock.tensors import checksums_by_rank
from millrace.engines.versions import decode_version
from millrace.engines.vllm.connectors import require_dropping
from millrace.engines.vllm.extension import Extension
from millrace.engines.vllm.facts import Server, VLLMFacts, has_extension, read_facts, transfer_config
from millrace.engines.vllm.guards import check_reload, check_request
from millrace.engines.vllm.metrics import read_metrics
from millrace.engines.vllm.transfer import TransferEngine
from millrace.engines.vllm.wire import Answer, encode, wire_id
from millrace.errors import EngineRefused, EngineTimeout
from millrace.http import HttpClient
from millrace.types import (
    ALL_MEMORY,
    Capability,
    EngineInfo,
    EngineLoad,
    GenerateRequest,
    Generation,
    MemoryTag,
    PauseMode,
)

# at_once: see `millrace_vllm_keys`. A server without Millrace's middleware ignores it.
PAUSE_PATHS = {
    PauseMode.ABORT: "/pause?mode=abort&at_once=true",
    PauseMode.RETRACT: "/pause?mode=keep&at_once=true",
    PauseMode.KEEP: "/pause?mode=keep&clear_cache=false&at_once=true",
}
CHECKER_DEADLINE = 600.0  # seconds; vLLM copies every tensor to the host and hashes it there


class VLLMEngine(StockEngine[VLLMFacts]):
    """One vLLM server in development mode (VLLM_SERVER_DEV_MODE=1), which opens its control routes.

    Millrace loads an extension into the workers of the servers that it launches, and sends weights through it. A
    server without the extension is updated from disk, or by NCCL if it was started with --weight-transfer-config. Its
    checksums are vLLM's own, if it has any (0.32).
    """

    _version: int | None = None  # of the served weights, for servers that do not store it
    _counted: tuple[float, float] = (0.0, 0.0)  # the last reading of the token counter: time.monotonic() and count

    @cached_property
    def _extension(self) -> Extension:
        """The extension. A server without one has no use for it."""
        return Extension(self.name, self._control, self._decode, self._ranks)

    @cached_property
    def _transfer(self) -> TransferEngine:
        """vLLM's own transfer engine. A server without one never opens a session."""
        return TransferEngine(self._control)

    async def initialize(self, version: int | None = None) -> None:
        await self._facts()  # first: it raises a clear error if the control routes are closed
        # Data-parallel ranks that resume wait for each other. One that runs does not come, and the call would hang.
        if (await self._ask("/is_paused"))["is_paused"]:
            await self._resume_server()
        if version is not None:
            await self._drop_cache()  # nothing runs yet; it raises if this can't be done
            await self._name_version(version)
        else:
            self._version = await self._served_version()
            await self._attach()

    async def flush_cache(self, *, deadline: float = 30.0) -> None:
        end = time.monotonic() + deadline
        while not await self._flushed():
            if time.monotonic() + IDLE_POLL_SECONDS >= end:
                raise EngineTimeout(self.name, f"/reset_prefix_cache: requests still ran after {deadline:.0f} s")
            await asyncio.sleep(IDLE_POLL_SECONDS)

    async def _flushed(self) -> bool:
        """Try to drop the cached prefixes. Return whether it worked: vLLM can't while a request runs.

        vLLM 0.23 does not report that. It is asked to preempt running requests, and its answer is an error if the cache
        is not empty then. So it can't show that it has dropped what it keeps elsewhere than on the device.
        """
        path, offloads = "/reset_prefix_cache", (await self._server()).offloads
        answer = await self._control(f"{path}?reset_external=true" if offloads else path, None)
        if answer is not None:
            return bool(answer["success"])
        if offloads:
            raise EngineRefused(
                self.name, "it does not report whether it dropped its offloaded KV cache; use vLLM 0.32"
            )
        if self._calls.sent:
            return False
        await self._control("/reset_prefix_cache?reset_running_requests=true", None)
        return True

    async def leave_group(self, name: str) -> None:
        # Without the extension there is nothing to do: vLLM's transfer engine leaves a group when it joins the next.
        if (await self._server()).extension:
            await self._extension.call("millrace_leave", name)

    async def checksums(self) -> Mapping[str, str]:
        """Return digests of the tensors as each rank holds them: fused, sharded and packed.

        Names begin with the rank. Without the extension they are vLLM's own, which leave out layers that vLLM has
        packed for the CPU.
        """
        server = await self._server()
        if server.extension:
            return checksums_by_rank(await self._extension.call("millrace_checksums"))
        if not server.checker:
            raise EngineRefused(
                self.name, "its workers do not have Millrace's extension, and it has no /weight_checker (vLLM 0.32)"
            )
        await self._transfer.end()  # before, some tensors have no memory
        body = await self._control("/weight_checker", {"action": "checksum"}, deadline=CHECKER_DEADLINE)
        return self._decode("/weight_checker", lambda: dict(body["checksums"]))

    async def sampled_checksums(self) -> Mapping[str, str]:
        if Capability.SAMPLED_CHECKSUMS not in (await self._facts()).info.capabilities:
            raise EngineRefused(self.name, "its workers do not have Millrace's extension, which makes the checksums")
        if self.state.updating is None:
            raise EngineRefused(self.name, "no update is open; sampled checksums are of an update's tensors")
        return self._extension.samples

    async def needed_parts(
        self,
        tensors: Sequence[TensorSpec],
        *,
        deadline: float,
        group: str | None = None,  # noqa: ARG002
    ) -> NeededParts:
        if Capability.UPDATE_FROM_PARTS not in (await self._facts()).info.capabilities:
            raise EngineRefused(self.name, "its workers do not have Millrace's extension, which takes parts of tensors")
        async with self._control_call():
            require(self.state.updating is None, "an update is open; commit it or roll it back first")
            return await self._extension.needs(tensors, deadline)

    async def audit(
        self, samples: Sequence[WeightSample], *, deadline: float
    ) -> tuple[Sequence[HeldLayer], Sequence[int]]:
        async with self._control_call():
            return await self._extension.audit(samples, deadline)

    async def loads(self) -> EngineLoad:
        server = await self._server()
        text = await self._ask("/metrics")
        metrics = self._decode("/metrics", lambda: read_metrics(text))
        (then, before), now, made = self._counted, time.monotonic(), metrics["generation_tokens_total"]
        self._counted = now, made
        return EngineLoad(
            running_requests=int(metrics["num_requests_running"]),
            waiting_requests=int(metrics["num_requests_waiting"]),
            used_tokens=int(metrics["kv_cache_usage_perc"] / server.replicas * server.total_tokens),
            max_tokens=server.total_tokens,
            tokens_per_second=(made - before) / (now - then) if then else 0.0,
        )

    async def info(self) -> EngineInfo:
        facts = await self._facts()
        return replace(facts.info, weight_version=await self._served_version())

    async def _generate(
        self, by: HttpClient, request: GenerateRequest, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Generation:
        server, version = await self._server(), self._version
        if by is not self._http and not server.versions:
            raise EngineRefused(
                self.name, "it does not report which weights made an answer, so it can't be used behind a router"
            )
        path, answer = server.path, Answer()
        if (sent := await self._body(path, request, deadline)) is None:
            return answer.generation(request, version)
        body = await by.generate(path, sent, deadline=deadline, headers=headers)
        self._decode(path, lambda: answer.take(path, body))
        experts = (await self._facts()).experts
        return self._decode_generation(path, lambda: answer.generation(request, version, experts))

    async def _body(
        self, path: str, request: GenerateRequest, _deadline: float, *, stream: bool = False
    ) -> Mapping[str, object] | None:
        """Return what to send for a request. None: it was aborted before."""
        return encode(path, request, stream=stream)

    async def _stream(self, request: GenerateRequest, deadline: float) -> AsyncIterator[tuple[Generation, bool]]:
        path, version = (await self._server()).path, self._version
        if request.prompt_logprobs:
            raise EngineRefused(
                self.name, "its streams have no logprobs of the prompt; use generate, or ask without them"
            )
        answer, experts = Answer(), (await self._facts()).experts

        def with_more(event: Mapping[str, Any]) -> Generation:
            answer.take(path, event)
            return answer.generation(request, version, experts)

        made = answer.generation(request, version)
        if (sent := await self._body(path, request, deadline, stream=True)) is not None:
            async for event in self._events(path, sent, deadline):
                made = self._decode_generation(path, partial(with_more, event))
                if answer.finish_reason is None:
                    yield made, False
        yield made, True

    async def _detokenize(self, tokens: Sequence[int], deadline: float) -> str:
        answer = await self._http.generate("/detokenize", {"tokens": tokens}, deadline=deadline)
        return self._decode("/detokenize", lambda: str(answer["prompt"]))

    async def _abort(self, names: Sequence[str]) -> None:
        # A server without this route ends a request when its connection closes.
        server = await self._server()
        if server.aborts:
            body = {"request_ids": [wire_id(server.path, name) for name in names]}
            await self._control("/abort_requests", body, deadline=ABORT_DEADLINE, repeatable=True)

    async def _abort_all(self, names: Sequence[str]) -> None:
        # An empty list means all requests. In 0.23 it means none, so there only this client's requests are aborted.
        if not (await self._server()).aborts:
            raise EngineRefused(self.name, "it can't abort a request by its id; start it with --tokens-only")
        await self._control("/abort_requests", {"request_ids": []}, repeatable=True)
        if names:
            await self._abort(names)

    async def _pause_server(self, mode: PauseMode) -> None:
        # vLLM's mode `keep` drops the KV cache unless clear_cache=false. Dropping it is what RETRACT means.
        await self._control(PAUSE_PATHS[mode], None, repeatable=True)
        if mode is PauseMode.ABORT:
            sent = self._calls.sent
            await self._calls.until_returned(sent, IDLE_POLL_SECONDS)
            # Requests that came too late for the pause wait in the server.
            await self._abort_until_ended(sent, self._abort)

    async def _drop_cache(self) -> None:
        """Drop what is kept in host memory. vLLM's pause in mode `abort` has dropped the rest, or has failed."""
        if (await self._server()).offloads:
            await self.flush_cache()

    async def _resume_server(self) -> None:
        await self._control("/resume", None, repeatable=True)

    async def _release(self, before: ServerState, after: ServerState) -> None:
        """Release memory. vLLM releases all of it at once, and allocates it by tag.

        At level 1, vLLM keeps a copy of the weights in host memory. While the weights are released, the KV cache stays
        released too, whatever the caller asked: it is useless without the weights, and if it is allocated before them,
        vLLM writes to unmapped memory and crashes.
        """
        if MemoryTag.WEIGHTS in before.asleep:
            return
        await self._wake_up(before.asleep)
        if MemoryTag.WEIGHTS in after.asleep:
            await self._control("/sleep?level=2", None, deadline=MEMORY_DEADLINE)
        else:
            await self._control("/sleep?level=1", None, deadline=MEMORY_DEADLINE)
            await self._wake_up({MemoryTag.WEIGHTS})

    async def _reallocate(self, what: frozenset[MemoryTag]) -> None:
        before, after = self.state.asleep, self.state.asleep - what
        if MemoryTag.WEIGHTS not in after:
            released = ALL_MEMORY if MemoryTag.WEIGHTS in before else before
            await self._wake_up(released - after)

    async def _wake_up(self, tags: Set[MemoryTag]) -> None:
        for tag in sorted(tags, reverse=True):  # the weights first
            await self._control(f"/wake_up?tags={tag}", None, deadline=MEMORY_DEADLINE)

    async def _open_update(self) -> None:
        self._extension.open()

    def _loader(self, bucket: Bucket, facts: VLLMFacts) -> Callable[[float], Awaitable[None]]:
        if isinstance(bucket, DiskBucket):
            bucket = bucket.for_holder_of(self._holds)
        if facts.server.extension:
            return self._extension.loading(bucket, facts.info.ranks)
        if facts.server.transfer and isinstance(bucket, ProcessGroupBucket):
            return self._transfer.loading(bucket)
        if not isinstance(bucket, DiskBucket):
            raise InvalidStateError(
                "its workers lack Millrace's extension; it loads weights from disk, or by NCCL if it was started "
                'with --weight-transfer-config \'{"backend": "nccl"}\''
            )
        if self._transfer.receiving:
            raise InvalidStateError("this update already receives tensors by NCCL, and can't also load from disk")
        check_reload(facts.model, facts.server)
        body = {"method": "reload_weights", "kwargs": {"weights_path": bucket.path}}
        return lambda deadline: self._control("/collective_rpc", body, deadline=deadline)

    async def _commit(self, version: int) -> None:
        if (await self._server()).extension:
            await self._extension.call("millrace_commit", str(version))
        await self._transfer.end()
        await self._name_version(version)

    async def _abort_update(self) -> None:
        if (await self._server()).extension:
            await self._extension.call("millrace_abandon")
        await self._transfer.end()

    async def _load_lora(self, name: str, path: str, deadline: float) -> int | None:
        # On the CPU, vLLM applies the adapter in the last slot to requests without one. That slot must stay empty.
        server = await self._server()
        before: list[int | None] = []
        if server.extension:
            before = await self._extension.slots()
        if server.on_cpu and None not in before[:-1]:
            raise EngineRefused(
                self.name,
                f"it has {len(before)} slots for LoRA adapters, and on the CPU one must stay empty; unload one, or "
                "start it with a higher max_loras and Millrace's extension",
            )
        await self._control("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, deadline=deadline)
        if not server.extension:
            return None
        return next((number for number in await self._extension.slots() if number not in before), None)

    async def _unload_lora(self, name: str, worker_id: int | None, deadline: float) -> None:
        await self._control("/v1/unload_lora_adapter", {"lora_name": name}, deadline=deadline)
        if worker_id is not None:
            await self._extension.call("millrace_forget", str(worker_id), deadline=deadline)

    async def _join(self, group: ProcessGroup, deadline: float) -> None:
        if (await self._server()).transfer:
            await self._transfer.join(group, deadline)
        else:
            await self._extension.join(group, deadline)

    async def _probe(self, deadline: float) -> None:
        await self._http.control("GET", "/health", deadline=deadline)

    async def _read_facts(self) -> VLLMFacts:
        api = await self._ask("/openapi.json")
        if "/server_info" not in api["paths"]:
            raise EngineRefused(
                self.name,
                "it is not vLLM, or its control routes are closed; set VLLM_SERVER_DEV_MODE=1 in the server's "
                "environment, and make sure that no other host can reach it",
            )
        config = (await self._ask("/server_info?config_format=json"))["vllm_config"]
        require_dropping(self.name, transfer_config(config))
        served = (await self._ask("/v1/models"))["data"][0]
        version = (await self._ask("/version"))["version"]
        model = await self._read_model(Path(served["root"]))
        answers = await self._extension.answering() if has_extension(config) else 0
        return self._decode("/server_info", lambda: read_facts(version, served, api, config, model, answers))

    def _check(self, request: GenerateRequest, facts: VLLMFacts) -> None:
        check_request(request, facts.limits, facts.server)

    def _why_no_sleep(self) -> str:
        return "it was started without --enable-sleep-mode, so it can't release memory"

    async def _server(self) -> Server:
        """Return the server's properties, which are part of its facts."""
        return (await self._facts()).server

    async def _ranks(self) -> int:
        return (await self._facts()).info.ranks

    async def _name_version(self, version: int) -> None:
        if (await self._server()).versions:
            await self._control("/update_weight_version", {"new_version": str(version)})
        self._version = version

    async def _served_version(self) -> int | None:
        server = await self._server()
        if server.versions:
            return decode_version((await self._ask("/weight_info"))["weight_version"])
        if self._version is None and server.extension:
            return decode_version((await self._extension.call("millrace_state"))[0]["version"] or "")
        return self._version
