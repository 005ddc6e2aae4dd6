"""The KV cache events of an engine on a GPU draw requests, as on the CPU."""

import asyncio
from pathlib import Path

from millrace.engines.stock.interpreter import StockConfig
from millrace.fleet.local import open_fleet
from tests.conformance.kv_events import check_routing_by_kv_events


def test_its_kv_events_draw_requests(config: StockConfig, tiny_model: Path, tmp_path: Path) -> None:
    async def hold() -> None:
        telling = config.model_copy(update={"kv_events": True})
        async with open_fleet(telling, tiny_model, log_dir=tmp_path) as fleet:
            await check_routing_by_kv_events(fleet, tiny_model, 1)

    asyncio.run(hold())
