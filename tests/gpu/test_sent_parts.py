"""A trainer's ranks send parts of tensors by NCCL to ranks on other GPUs, without an engine."""

import pytest
import torch

from tests.torchrun import torchrun


def test_parts_are_sent_by_nccl() -> None:
    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip("it takes two GPUs")
    torchrun("tests/weights/sending_shards.py", "cuda", ranks=gpus // 2)
