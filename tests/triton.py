"""Triton's interpreter for vLLM on the CPU.

vLLM returns routed experts with its second model runner only, whose kernels are written in Triton. PyPI's Triton
compiles for GPUs, but also interprets kernels with NumPy. vLLM refuses to use it unless it has a backend named `cpu`.
"""

import subprocess
from pathlib import Path

COMPILER = """
from triton.backends.compiler import BaseBackend


class Compiler(BaseBackend):  # the interpreter calls none of its methods
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "cpu"

    def parse_options(self, options):
        return options

    def add_stages(self, stages, options, language):
        pass

    def load_dialects(self, context):
        pass

    def get_module_map(self):
        return {}
"""
DRIVER = """
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class Driver(DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, *_):
        return 0

    def map_python_to_cpp_type(self, ty):
        return "int"

    def get_benchmarker(self):
        return None

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        pass
"""
FILES = {
    "millrace_triton_cpu/__init__.py": "",
    "millrace_triton_cpu/compiler.py": COMPILER,
    "millrace_triton_cpu/driver.py": DRIVER,
    "millrace_triton_cpu-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: millrace-triton-cpu\nVersion: 0\n",
    "millrace_triton_cpu-0.dist-info/entry_points.txt": "[triton.backends]\ncpu = millrace_triton_cpu\n",
}


def install_triton(python: Path, folder: Path) -> dict[str, str]:
    """Installs Triton and the backend into a folder. Returns the variables with which vLLM interprets its kernels."""
    options = ["--quiet", "--no-deps", "--no-input", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([python, "-m", "pip", "install", *options, "triton==3.9.0"], check=True)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
