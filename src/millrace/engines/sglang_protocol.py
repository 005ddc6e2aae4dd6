"""What speaks SGLang's native HTTP API: the part of the contract that the embedded engine and SGLang answer alike."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from millrace.engines.base import Engine
from millrace.engines.sglang.guards import OWN_FIELDS, OWN_SAMPLING
from millrace.engines.sglang_wire import decode_generate, encode_generate, wire_id
from millrace.errors import EngineError, EngineFailed, EngineRefused, EngineTimeout
from millrace.http import HttpClient
from millrace.types import EngineLoad, GenerateRequest, Generation, PauseMode, ProcessGroup, ProcessGroupBucket

CONTROL_DEADLINE = 30.0  # seconds; a control call waits for one forward pass at most, which is seconds on a slow CPU
ABORT_DEADLINE = 5.0
IDLE_POLL_SECONDS = 0.02
PAUSE_MODES = {PauseMode.ABORT: "abort", PauseMode.RETRACT: "retract", PauseMode.KEEP: "in_place"}


class SGLangProtocol(Engine):
    """An engine at `url` that speaks SGLang's native API. Subclasses add what they do in their own way."""

    def __init__(self, name: str, url: str, *, api_key: str | None = None, admin_key: str | None = None) -> None:
        self.name = name
        self.url = url
        self._http = HttpClient(name, url, api_key=api_key, admin_key=admin_key)

    async def generate(self, request: GenerateRequest, *, deadline: float) -> Generation:
        try:
            body = await self._http.generate("/generate", self._encode(request), deadline=deadline)
        except (asyncio.CancelledError, EngineTimeout):
            await self._abandon(request.request_id)
            raise
        return self._decode(request, body)

    async def stream(self, request: GenerateRequest, *, deadline: float) -> AsyncGenerator[Generation, None]:
        finished = False
        try:
            async for body in self._http.events("/generate", self._encode(request, stream=True), deadline=deadline):
                if "error" in body:
                    raise EngineRefused(self.name, f"/generate was refused: {body['error'].get('message')}")
                finished = body.get("meta_info", {}).get("finish_reason") is not None
                yield self._decode(request, body)
        finally:
            if not finished:
                await self._abandon(request.request_id)

    async def abort(self, request_id: str | None = None) -> None:
        body = {"abort_all": True} if request_id is None else {"rid": wire_id(request_id)}
        await self._control("/abort_request", body, repeatable=True)

    async def pause(self, mode: PauseMode) -> None:
        await self._control("/pause_generation", {"mode": PAUSE_MODES[mode]}, repeatable=True)

    async def resume(self) -> None:
        await self._control("/continue_generation", {}, repeatable=True)

    async def flush_cache(self, *, deadline: float = 30.0) -> None:
        await self._when_idle("/flush_cache", {}, deadline)

    async def join_group(self, group: ProcessGroup, *, deadline: float) -> None:
        body = {
            "master_address": group.address,
            "master_port": group.port,
            "rank_offset": group.rank_offset,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": group.backend,
            "timeout": deadline,  # for the embedded engine; SGLang waits as long as torch does
        }
        await self._control("/init_weights_update_group", body, deadline=deadline)

    async def leave_group(self, name: str) -> None:
        await self._control("/destroy_weights_update_group", {"group_name": name})

    async def loads(self) -> EngineLoad:
        ranks = (await self._ask("/v1/loads"))["loads"]
        return EngineLoad(
            running_requests=sum(r["num_running_reqs"] for r in ranks),
            waiting_requests=sum(r["num_waiting_reqs"] for r in ranks),
            used_tokens=sum(r["num_used_tokens"] for r in ranks),
            max_tokens=sum(r["max_total_num_tokens"] for r in ranks),
            tokens_per_second=sum(r["gen_throughput"] for r in ranks),
        )

    async def close(self) -> None:
        await self._http.close()

    async def _ask(self, path: str, *, deadline: float = CONTROL_DEADLINE) -> Any:
        return await self._http.control("GET", path, deadline=deadline, repeatable=True)

    async def _control(
        self, path: str, body: object, *, deadline: float = CONTROL_DEADLINE, repeatable: bool = False
    ) -> Any:
        return await self._http.control("POST", path, body, deadline=deadline, repeatable=repeatable)

    async def _when_idle(self, path: str, body: object, deadline: float) -> None:
        """A call that the server refuses while requests run: asked again until they are done or the deadline passes."""
        end = time.monotonic() + deadline
        while True:
            try:
                await self._control(path, body, deadline=end - time.monotonic())
                return
            except EngineRefused as error:
                if time.monotonic() + IDLE_POLL_SECONDS >= end:
                    raise EngineTimeout(
                        self.name, f"{path}: requests still ran after {deadline:.0f} s: {error}"
                    ) from error
            await asyncio.sleep(IDLE_POLL_SECONDS)

    async def _abandon(self, request_id: str) -> None:
        """Aborts on the server what nobody waits for any more. Where that fails the server sees the closed
        connection."""
        try:
            await self._http.control("POST", "/abort_request", {"rid": wire_id(request_id)}, deadline=ABORT_DEADLINE)
        except EngineError:
            return

    def _encode(self, request: GenerateRequest, *, stream: bool = False) -> Mapping[str, object]:
        """What `extra` says against the request would be dropped without a word: refused."""
        sampling = request.extra.get("sampling_params", {})
        if not isinstance(sampling, Mapping):
            raise EngineRefused(self.name, f"request {request.request_id}: extra.sampling_params must be a mapping")
        for taken in (OWN_FIELDS & request.extra.keys(), OWN_SAMPLING & sampling.keys()):
            if taken:
                raise EngineRefused(self.name, f"request {request.request_id}: {min(taken)} in extra is Millrace's own")
        return encode_generate(request, stream=stream)

    def _decode(self, request: GenerateRequest, body: Any) -> Generation:
        try:
            return decode_generate(request, body)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineFailed(self.name, f"/generate answered what makes no sense: {error!r}") from error


def distributed_body(bucket: ProcessGroupBucket) -> Mapping[str, object]:
    """The body of POST /update_weights_from_distributed."""
    return {
        "names": [t.name for t in bucket.tensors],
        "dtypes": [t.dtype for t in bucket.tensors],
        "shapes": [t.shape for t in bucket.tensors],
        "group_name": bucket.group_name,
    }
