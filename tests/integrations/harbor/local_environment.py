"""An environment of Harbor's for the tests: a folder and processes of this host, in place of a container.

Commands and uploaded scripts name the paths of a container, such as /logs; here these are below the folder.
"""

# ruff: noqa: ASYNC240
# Harbor is untyped where mypy runs.
# mypy: disable-error-code="misc, no-any-return"

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from harbor.environments.base import BaseEnvironment, ExecResult

OUTSIDE = re.compile(r"(?<![\w./-])/(?=(?:app|logs|tests|installed-agent)\b)")


class LocalEnvironment(BaseEnvironment):
    """journal: a file to which `start` and `stop` write. slow_stop: seconds that `stop` takes. broken: whether the
    build fails."""

    def __init__(
        self, *arguments: Any, journal: str | None = None, slow_stop: float = 0, broken: bool = False, **more: Any
    ) -> None:
        self.journal, self.slow_stop, self.broken = journal, slow_stop, broken
        self.root = Path(tempfile.mkdtemp(prefix="local-", dir="/tmp"))  # short: it has tmux's socket
        self.running: set[int] = set()
        super().__init__(*arguments, **more)

    @staticmethod
    def type() -> str:
        return "local"

    def _validate_definition(self) -> None:
        pass

    def inside(self, text: str) -> str:
        """Return a text with the paths of a container below the folder."""
        return OUTSIDE.sub(f"{self.root}/", text)

    def note(self, what: str) -> None:
        if self.journal is not None:
            with open(self.journal, "a") as file:
                file.write(f"{what} {self.root}\n")

    async def start(self, force_build: bool) -> None:
        self.note("start")
        for folder in ("app", "logs/agent", "logs/verifier", "logs/artifacts", "tests"):
            (self.root / folder).mkdir(parents=True)
        if self.broken:
            raise RuntimeError("no space left\non the device")

    async def stop(self, delete: bool) -> None:
        self.note("stopping")
        await asyncio.sleep(self.slow_stop)
        await self.exec("tmux kill-server")
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)
        self.note("stop")

    async def exec(
        self,
        command: str,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_sec: int | None = None,
        user: str | int | None = None,
    ) -> ExecResult:
        own = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.root),
            "TMUX_TMPDIR": str(self.root),
        }
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", self.inside(command)),
            cwd=self.inside(cwd or "/app"),
            env={name: self.inside(value) for name, value in {**own, **(self._merge_env(env) or {})}.items()},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self.running.add(process.pid)
        output, errors = await asyncio.wait_for(process.communicate(), timeout_sec)
        self.running.remove(process.pid)
        return ExecResult(stdout=output.decode(), stderr=errors.decode(), return_code=process.returncode or 0)

    async def upload_file(self, source_path: Path | str, target_path: str) -> None:
        target = Path(self.inside(target_path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.inside(Path(source_path).read_text()))

    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None:
        for path in Path(source_dir).rglob("*"):
            if path.is_file():
                await self.upload_file(path, f"{target_dir}/{path.relative_to(source_dir)}")

    async def download_file(self, source_path: str, target_path: Path | str) -> None:
        shutil.copy(self.inside(source_path), target_path)

    async def download_dir(self, source_dir: str, target_dir: Path | str) -> None:
        shutil.copytree(self.inside(source_dir), target_dir, dirs_exist_ok=True)
