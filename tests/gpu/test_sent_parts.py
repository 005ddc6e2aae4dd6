"""A trainer's ranks send parts of tensors by NCCL to ranks of engines that are apart."""

from pathlib import Path

import pytest
import torch

from millrace.config.engines import SGLangEngineConfig
from millrace.engines.stock.interpreter import StockConfig
from tests.torchrun import torchrun
from tests.weights.test_apart import check_engines_that_fail


def test_parts_are_sent_by_nccl() -> None:
    """Without an engine."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip("it takes two GPUs")
    torchrun("tests/weights/sending_shards.py", "cuda", ranks=gpus // 2)


def test_engines_that_fail_do_not_affect_others_and_the_next_version_comes(config: StockConfig, tmp_path: Path) -> None:
    """The trainer has the first two GPUs, and each engine one of the next two. With fewer, all use the first one."""
    if not isinstance(config, SGLangEngineConfig):
        pytest.skip("it was written for SGLang, as test_apart.py")
    settings = config.model_dump(mode="json", exclude_unset=True)
    if config.device == "cuda":
        assert config.python is not None
        settings["base_gpu_id"] = 2
        if torch.cuda.device_count() < 4:
            settings["python"] = str(on_first_gpu(config.python, tmp_path / "python"))
    check_engines_that_fail(settings, tmp_path)


def on_first_gpu(python: Path, wrapper: Path) -> Path:
    """Writes an interpreter that starts a server on the first GPU, as a host of its own to NCCL."""
    wrapper.write_text(
        "#!/bin/sh\n"
        'for one do shift; case $one in --base-gpu-id=*) one=--base-gpu-id=0;; esac; set -- "$@" "$one"; done\n'
        f'NCCL_HOSTID=engine exec {python} "$@"\n'
    )
    wrapper.chmod(0o755)
    return wrapper
