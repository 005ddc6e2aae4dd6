"""Runs a script of the tests on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

from millrace.launch.ports import free_port

ROOT = Path(__file__).parents[1]


def run_two_ranks(script: str, *arguments: str) -> None:
    """Runs `tests/<script>` under torchrun. If it fails, this fails with its output."""
    torchrun(f"tests/{script}", *arguments)


def torchrun(*command: str, ranks: int = 2) -> str:
    """Runs the command on that many ranks and returns their output."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,  # a minute on a quiet machine
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def run_apart(script: str, *arguments: str, log: Path) -> list[int]:
    """Runs `tests/<script>` on two ranks, and returns their exit statuses. If one dies, the other one goes on; torchrun
    would end both. `log` gets their output."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1")), "WORLD_SIZE": "2"}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with log.open("wb") as output:
            for number in ("0", "1"):
                variables = environment() | meeting | {"RANK": number, "LOCAL_RANK": number}
                command = [sys.executable, f"tests/{script}", *arguments]
                ranks.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=output))
        return [rank.wait(timeout=600) for rank in ranks]  # a minute on a quiet machine
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
