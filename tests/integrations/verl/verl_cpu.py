"""Stand-ins that let verl's trainer run on a CPU, for tests: VERL_USE_EXTERNAL_MODULES=verl_cpu VERL_PLATFORM=cpu.

verl knows no platform without an accelerator. Ray is told of GPUs that do not exist (`ray_kwargs.ray_init.num_gpus`).
"""

import contextlib
import socket
import time
import types
from collections.abc import Iterator
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray._private.parameter import RayParams
from verl.plugin.platform import PlatformBase, PlatformRegistry


class _Module(types.ModuleType):
    """torch.cpu, and what verl asks of torch.cuda besides."""

    ZERO = frozenset({"memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        answers: dict[str, Any] = {"mem_get_info": (1 << 33, 1 << 34), "get_device_name": "cpu", "is_available": False}
        answer = 0 if name in self.ZERO else answers.get(name)
        return lambda *_, **__: answer


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):  # type: ignore[misc]  # verl comes without types
    """A platform of CPUs only."""

    _module = _Module("verl_cpu_device")
    device_name = property(lambda self: "cpu")
    vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: self._module)

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None: ...


_init_process_group = dist.init_process_group


def _with_one_backend(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
    """verl asks for "cpu:gloo,DEVICE:BACKEND", which torch refuses if the device is the CPU itself."""
    if isinstance(backend, str) and backend.count("cpu:gloo") > 1:
        backend = "cpu:gloo"
    return _init_process_group(backend, *args, **kwargs)


dist.init_process_group = _with_one_backend


# On a busy machine, a node of Ray exceeds 15 s for its agents' ports, and 30 s for itself. Neither is a setting. So
# the agents get ports, and the node gets more time.
_AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
_select_ports = RayParams.update_pre_selected_port
_get_node = ray._private.services.get_node


def _select_agents_ports(self: Any) -> None:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in _AGENT_PORTS]
        for name, one in zip(_AGENT_PORTS, sockets, strict=True):
            setattr(self, name, getattr(self, name) or one.getsockname()[1])
    _select_ports(self)


def _get_node_in_time(*args: Any, **kwargs: Any) -> Any:
    end = time.monotonic() + 300
    while True:
        try:
            return _get_node(*args, **kwargs)
        except RuntimeError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


RayParams.update_pre_selected_port = _select_agents_ports
ray._private.services.get_node = _get_node_in_time
