"""Two ranks of a script of the tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_two_ranks(script: str, *arguments: str) -> None:
    """Runs `tests/<script>` under torchrun. Fails with what it said, where it fails."""
    torchrun(f"tests/{script}", *arguments)


def torchrun(*command: str) -> str:
    """Two ranks of the command; what they printed."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
