"""Publishes by delta to an engine on a GPU: it writes only what has changed."""

import asyncio
from pathlib import Path

from millrace.engines.spec import LaunchSpec
from millrace.engines.start import start
from millrace.engines.stock.interpreter import StockConfig
from tests.weights.deltas import check_only_changes_are_written, opened
from tests.weights.variants import make_variants


def test_a_delta_changes_only_what_has_changed(config: StockConfig, tmp_path: Path) -> None:
    (variant,) = make_variants(tmp_path / "variants", 1, context_length=4096)

    async def hold() -> None:
        started = await start(config, LaunchSpec(model_path=variant.folder, log_dir=tmp_path))
        try:
            async with opened(started, variant.folder, tmp_path) as deltas:
                await check_only_changes_are_written(deltas, tmp_path / f"{config.kind}-0.log")
        finally:
            await started.end()

    asyncio.run(hold())
