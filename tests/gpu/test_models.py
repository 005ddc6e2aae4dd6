"""Models as they come from the Hub, on a GPU: a mixture of experts in bfloat16, trained in float32."""

import asyncio
from pathlib import Path

import torch
from transformers import PreTrainedModel

from millrace.engines.stock.interpreter import StockConfig
from millrace.fleet.local import open_fleet
from tests.architectures import make_moe_folder
from tests.gpu.test_weights import ALIKE, OTHERWISE, PROMPTS, alike, first_tokens_of
from tests.weights.test_published_names import changed
from tests.weights.variants import greedy


def test_a_mixture_of_experts_in_bfloat16(config: StockConfig, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    before = make_moe_folder(folder, dtype=torch.bfloat16, head_dim=64)
    asyncio.run(hold(config, folder, before.float(), tmp_path))


async def hold(config: StockConfig, folder: Path, before: PreTrainedModel, place: Path) -> None:
    model = changed(folder)
    old, new = first_tokens_of(before), first_tokens_of(model)
    async with open_fleet(config, folder, log_dir=place / "logs") as fleet:
        assert {(await engine.info()).dtype for engine in fleet.engines.values()} <= {"bfloat16", None}
        model = model.to(config.device)
        report = await fleet.publish(list(model.named_parameters()), 1, bucket_bytes=64 * 1024, deadline=240)
        assert not report.failed
        for name, engine in fleet.engines.items():
            made = await asyncio.gather(*(greedy(engine, prompt, f"{i}", 1) for i, prompt in enumerate(PROMPTS)))
            like = [alike(tokens, PROMPTS, [one.output_ids[0] for one in made]) for tokens in (new, old)]
            print(f"{name}: {like[0]:.0%} of the published model's first tokens, {like[1]:.0%} of the folder's")
            assert like[0] >= ALIKE
            assert like[1] <= OTHERWISE
