"""The adapter of sglang-router."""

import asyncio
import time
from collections.abc import Mapping, Set
from contextlib import suppress

from millrace.engines.http_engine import IDLE_POLL_SECONDS, HttpEngine
from millrace.errors import EngineError, EngineRefused, EngineTimeout
from millrace.routers.base import ASK_DEADLINE, RouterClient, sampling_of
from millrace.types import GenerateRequest

# The fields of /generate that sglang-router 0.3.2 passes on. Each was observed at a worker. The router parses a request
# into its own structure, and silently drops the fields that it does not know.
KEPT = frozenset({
    "audio_data", "bootstrap_host", "bootstrap_pair_key", "bootstrap_port", "bootstrap_room", "custom_labels",
    "custom_logit_processor", "data_parallel_rank", "extra_key", "image_data", "log_metrics", "logprob_start_len",
    "lora_path", "modalities", "no_logs", "priority", "return_bytes", "return_entropy", "return_hidden_states",
    "return_text_in_logprobs", "sampling_params", "session_params", "top_logprobs_num", "video_data",
})  # fmt: skip
KEPT_SAMPLING = frozenset({
    "ebnf", "frequency_penalty", "json_schema", "min_new_tokens", "no_stop_trim", "presence_penalty", "regex",
    "repetition_penalty", "skip_special_tokens", "stop",
})  # fmt: skip


class SGLangRouter(RouterClient):
    """The client of sglang-router. The router assigns ids to its workers, and updates its list after it answers."""

    kind = "sglang"
    affinity_header = "X-SMG-Routing-Key"

    async def register(self, engine: HttpEngine, *, deadline: float) -> None:
        end = time.monotonic() + deadline
        body = {"url": engine.url, "api_key": engine.api_key}
        accepted = await self._http.control("POST", "/workers", body, deadline=deadline, repeatable=True)
        try:
            while not await self._is_healthy(accepted["worker_id"]):
                if time.monotonic() >= end:
                    raise EngineTimeout(
                        self.name, f"the router did not start to send requests to {engine.name} within {deadline:.0f} s"
                    )
                await asyncio.sleep(IDLE_POLL_SECONDS)
        except BaseException:
            await self._http.control("DELETE", f"/workers/{accepted['worker_id']}", deadline=ASK_DEADLINE)
            raise

    async def deregister(self, url: str) -> None:
        end = time.monotonic() + ASK_DEADLINE
        while (worker_id := (await self._ids()).get(url)) is not None:
            with suppress(EngineRefused):  # its removal is already in progress
                await self._http.control("DELETE", f"/workers/{worker_id}", deadline=ASK_DEADLINE)
            if time.monotonic() >= end:
                raise EngineTimeout(self.name, f"the router did not remove {url} within {ASK_DEADLINE:.0f} s")
            await asyncio.sleep(IDLE_POLL_SECONDS / 4)

    async def workers(self) -> Mapping[str, bool]:
        listed = await self._http.control("GET", "/workers", deadline=ASK_DEADLINE, repeatable=True)
        return {worker["url"]: worker["is_healthy"] for worker in listed["workers"]}

    def dropped(self, request: GenerateRequest) -> Set[str]:
        lost = {f"extra.{name}" for name in request.extra.keys() - KEPT}
        lost |= {f"extra.sampling_params.{name}" for name in sampling_of(request).keys() - KEPT_SAMPLING}
        return lost | {"sampling.logit_bias"} if request.sampling.logit_bias else lost

    async def _ids(self) -> Mapping[str, str]:
        listed = await self._http.control("GET", "/workers", deadline=ASK_DEADLINE, repeatable=True)
        return {worker["url"]: worker["id"] for worker in listed["workers"]}

    async def _is_healthy(self, worker_id: str) -> bool:
        try:
            worker = await self._http.control("GET", f"/workers/{worker_id}", deadline=ASK_DEADLINE)
        except EngineRefused:  # the router has not started to add the worker
            return False
        if (worker.get("job_status") or {}).get("status") == "failed":
            message = worker["job_status"]["message"]
            raise EngineError(self.name, f"the router did not accept the engine at {worker['url']}: {message}")
        return bool(worker["is_healthy"])
