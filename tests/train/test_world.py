import pytest
import torch
import torch.distributed as dist

from millrace.errors import ConfigError
from millrace.train.world import join_world


def test_alone_there_is_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
        assert not dist.is_initialized()
        assert world.sum(torch.tensor(3.0)).item() == 3.0
        assert world.any(True)
        assert not world.any(False)


@pytest.mark.parametrize("device", ["tpu", "gpu", "cpu:3", ""])
def test_a_device_that_does_not_exist_is_refused_by_name(device: str) -> None:
    with pytest.raises(ConfigError, match=f"train.device is '{device}'"), join_world(device):
        pass


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        with join_world("cuda") as world:
            assert world.device == torch.device("cuda:0")
    else:
        with pytest.raises(ConfigError, match="sees no GPU"), join_world("cuda"):
            pass
