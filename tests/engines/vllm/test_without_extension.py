"""A real vLLM server without Millrace's extension, to which Millrace attaches. Its checksums are vLLM's own."""

from pathlib import Path

import pytest
import torch

from millrace.buckets import DiskBucket
from millrace.engines.vllm.adapter import VLLMEngine
from millrace.errors import EngineRefused
from millrace.train.tiny import make_tiny_tokenizer
from millrace.types import Capability
from tests.architectures import make_model
from tests.engines.vllm.server import serving


def make_folder(folder: Path, seed: int) -> None:
    """Makes a model without tied embeddings, which vLLM's own reload needs on the CPU."""
    tokenizer = make_tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "head_dim": 32, "tie_word_embeddings": False}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    make_model("qwen3", seed, **sizes, **ends).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
async def test_equal_weights_have_equal_checksums(vllm_python: Path, tmp_path: Path) -> None:
    folders = [tmp_path / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        make_folder(folder, seed)
    async with serving(folders[0], vllm_python, tmp_path, extension=False) as server:
        engine = VLLMEngine("vllm", server.url, model_path=folders[0])
        try:
            await engine.initialize(0)
            capabilities = (await engine.info()).capabilities
            assert Capability.OWN_CHECKSUMS in capabilities
            assert Capability.SAMPLED_CHECKSUMS not in capabilities
            sums = [await engine.checksums()]
            for version, folder in ((1, folders[1]), (2, folders[0])):
                await engine.begin_update(version)
                await engine.load(DiskBucket(str(folder)), deadline=60)
                sums.append(await engine.checksums())
                with pytest.raises(EngineRefused, match="extension"):
                    await engine.sampled_checksums()
                await engine.commit()
            assert "model.norm.weight" in {name.rpartition(":")[2] for name in sums[0]}
            assert sums[0] == sums[2]
            assert sums[0] != sums[1]
        finally:
            await engine.close()
