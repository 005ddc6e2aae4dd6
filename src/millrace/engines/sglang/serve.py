"""Start SGLang's server as SGLang itself does. The engine's own interpreter runs this file.

    python serve.py SGLANG_ARGUMENT ...

It imports nothing of Millrace. The keys are in the environment, as MILLRACE_API_KEY and MILLRACE_ADMIN_API_KEY, and
stay out of command lines and logs. SGLang spawns its child processes from this file, so each child runs the module
level again. Code that children need too is at the module level and must be safe to run twice.

On the CPU (SGLANG_USE_CPU_ENGINE=1) it replaces the parts that are missing in the packages from PyPI. Nothing else is
changed.
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

# Allocations between two runs of Python's garbage collector. With the default of 700, the collector takes a quarter of
# the import time of each SGLang process.
GC_THRESHOLD = 50_000
# Operators of `sgl_kernel` that SGLang's Qwen3.5 names when it is imported, and its Qwen-VL processor imports Qwen3.5.
NAMED_KERNELS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)

# Options whose code in SGLang pins host memory, also on a CPU.
UNPINNED = {"--enable-lora", "--enable-return-routed-experts", "--enable-hierarchical-cache"}

KEYS = [key for name in ("MILLRACE_API_KEY", "MILLRACE_ADMIN_API_KEY") if (key := os.environ.get(name))]


class RedactedRecord(logging.LogRecord):
    """A log record with the keys redacted. SGLang logs all its arguments at the start, the keys among them."""

    def getMessage(self) -> str:
        message = super().getMessage()
        for key in KEYS:
            message = message.replace(key, "***")
        return message


class MissingKernels(types.ModuleType):
    """A stand-in for `sgl_kernel`, from which SGLang imports the CPU kernels by name.

    The backends that need no kernel package call none of them.
    """

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_cpu"):
            raise AttributeError(name)

        def missing(*_args: object, **_kwargs: object) -> None:
            raise RuntimeError(f"{name} needs the package sgl-kernel, which is not installed")

        return missing


class PageableMemory:
    """A stand-in for CUDA's runtime, where nothing pins memory. Both calls succeed."""

    def cudaHostRegister(self, *_: object) -> int:
        return 0

    def cudaHostUnregister(self, *_: object) -> int:
        return 0


def prepare_cpu() -> None:
    """Make SGLang work on a CPU with the packages from PyPI."""
    gc.set_threshold(GC_THRESHOLD)
    import torch

    try:
        import torchvision  # type: ignore[import-not-found,unused-ignore] # noqa: F401
    except (RuntimeError, OSError):
        # A CUDA build of torchvision can't load its operators with a CPU build of torch, and its import fails. It
        # succeeds if the operators are declared. They are never called here.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if not torch.cuda.is_available():
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # or the first repetition penalty would compile for minutes
        torch.cuda.synchronize = lambda *_: None  # the route /weights_checker calls it on every device
        if UNPINNED & set(sys.argv):
            unpin(torch)
    if importlib.util.find_spec("sgl_kernel") is None:
        kernels = MissingKernels("sgl_kernel")
        kernels.__path__ = []
        kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
        sys.modules["sgl_kernel"] = kernels
        for name in NAMED_KERNELS:
            torch.library.define(f"sgl_kernel::{name}", "() -> ()")


def unpin(torch: Any) -> None:
    """Make torch ignore `pin_memory`, and CUDA's runtime do nothing. SGLang's LoRA and its buffer of routed experts pin
    memory on every device, which fails without a GPU."""

    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            return make(*args, **{**kwargs, "pin_memory": False})

        return functools.wraps(make)(made)

    for name in ("tensor", "empty", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    torch.cuda.cudart = PageableMemory


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


# Python puts this file's folder first on the path, where its modules would hide others of the same name.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]
logging.setLogRecordFactory(RedactedRecord)
if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    prepare_cpu()

if __name__ == "__main__":
    main()
