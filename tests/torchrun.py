"""Runs a script of the tests on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_two_ranks(script: str, *arguments: str) -> None:
    """Runs `tests/<script>` under torchrun. If it fails, this fails with its output."""
    torchrun(f"tests/{script}", *arguments)


def torchrun(*command: str, ranks: int = 2) -> str:
    """Runs the command on that many ranks and returns their output."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=600,  # a minute on a quiet machine
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
