"""The kernels for GPUs, interpreted on the CPU."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import millrace


def test_the_kernels_do_what_torch_does(sglang_python: Callable[[str], Path]) -> None:
    script, extension = Path(__file__).with_name("kernels_check.py"), Path(millrace.__file__).parent / "extension"
    done = subprocess.run(
        [sglang_python("0.5.23"), script, extension],
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout == "alike\n", done.stderr
