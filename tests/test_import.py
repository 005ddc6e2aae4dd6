"""Importing the core is quick and loads no heavy package."""

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pyarrow", "duckdb", "sglang", "vllm", "zmq", "msgpack")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_millrace_loads_neither_torch_nor_an_engine() -> None:
    # The fleet and the client are imported too, as a custom trainer does.
    loaded = run("import sys, millrace, millrace.fleet.local, millrace.sync; print(' '.join(sys.modules))").split()
    assert not set(HEAVY) & set(loaded)


def test_importing_millrace_takes_under_300_ms() -> None:
    # The best of three counts, so that the machine's other work is not measured.
    code = "import time; t = time.perf_counter(); import millrace; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize(("own", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(own: str | None, used: str) -> None:
    code = "import os; from millrace.imports import passive_threads as p\nwith p(): import torch\n"
    code += "print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "TRUE"} | ({"OMP_WAIT_POLICY": own} if own else {})
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert f"OMP_WAIT_POLICY = '{used}'" in done.stderr
    assert done.stdout.strip() == str(own)


def test_every_public_name_is_there() -> None:
    import millrace

    for name in millrace.__all__:
        assert getattr(millrace, name) is not None
