"""What the engine's own interpreter runs: SGLang's server, started as SGLang itself starts it.

    python serve.py SGLANG_ARGUMENT ...

It imports nothing of Millrace. The keys come in the environment, as MILLRACE_API_KEY and MILLRACE_ADMIN_API_KEY, and
stay out of command lines and logs. SGLang spawns its children from this file, and each child runs the module level
again: what a child needs too is done there, and done on the second time as on the first.

On the CPU (SGLANG_USE_CPU_ENGINE=1) it stands in for what the packages from PyPI lack there. Nothing else is changed.
"""

import functools
import gc
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

# New objects between two looks of Python's garbage collector, whose own 700 cost a quarter of the time in which each of
# SGLang's processes is imported.
GC_THRESHOLD = 50_000

KEYS = [key for name in ("MILLRACE_API_KEY", "MILLRACE_ADMIN_API_KEY") if (key := os.environ.get(name))]


class RedactedRecord(logging.LogRecord):
    """SGLang logs all its arguments at the start, the keys among them."""

    def getMessage(self) -> str:
        message = super().getMessage()
        for key in KEYS:
            message = message.replace(key, "***")
        return message


class MissingKernels(types.ModuleType):
    """Stands for `sgl_kernel`, of which SGLang asks the CPU's kernels by name at import. None is called with the
    backends that need no kernel package."""

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_cpu"):
            raise AttributeError(name)

        def missing(*_args: object, **_kwargs: object) -> None:
            raise RuntimeError(f"{name} needs the package sgl-kernel, which is not installed")

        return missing


def prepare_cpu() -> None:
    gc.set_threshold(GC_THRESHOLD)
    import torch

    try:
        import torchvision  # type: ignore[import-not-found,unused-ignore] # noqa: F401
    except (RuntimeError, OSError):
        # torchvision's build for CUDA can't load its operators beside a torch for the CPU, and then fails to describe
        # them. Once they are declared, its import succeeds; they are never called here.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None  # the route /weights_checker calls it on every device
        if "--enable-lora" in sys.argv:
            unpin(torch)
    if importlib.util.find_spec("sgl_kernel") is None:
        kernels = MissingKernels("sgl_kernel")
        kernels.__path__ = []
        kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
        sys.modules["sgl_kernel"] = kernels


def unpin(torch: Any) -> None:
    """SGLang's LoRA pins memory on every device, which fails where there is no GPU."""

    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            return make(*args, **{**kwargs, "pin_memory": False})

        return functools.wraps(make)(made)

    for name in ("tensor", "empty", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, *_: tensor


def main() -> None:
    from sglang.launch_server import run_server  # type: ignore[import-not-found,unused-ignore]
    from sglang.srt.plugins import load_plugins  # type: ignore[import-not-found,unused-ignore]
    from sglang.srt.server_args import prepare_server_args  # type: ignore[import-not-found,unused-ignore]
    from sglang.srt.utils import kill_process_tree  # type: ignore[import-not-found,unused-ignore]

    load_plugins()
    arguments = prepare_server_args(sys.argv[1:])
    arguments.api_key = os.environ["MILLRACE_API_KEY"]
    arguments.admin_api_key = os.environ["MILLRACE_ADMIN_API_KEY"]
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


# This file's folder is first on the path, and its modules would be found before others of their names.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]
logging.setLogRecordFactory(RedactedRecord)
if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    prepare_cpu()

if __name__ == "__main__":
    main()
