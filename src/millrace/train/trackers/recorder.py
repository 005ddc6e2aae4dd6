"""The trainer's side of the experiment trackers: one process for each, which gets what it records by a pipe.

No call waits. A tracker that fails or hangs costs one warning, and at most END_SECONDS at the end of the run.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from millrace.config.models import RunConfig
from millrace.imports import require_modules
from millrace.launch.process import open_private
from millrace.rollout.chat import ChatFormat
from millrace.rollout.sample import Sample
from millrace.train.display import Display
from millrace.train.metrics import StepMetrics
from millrace.train.record import RunFolder
from millrace.train.trackers.base import RunState, TrackedRun
from millrace.train.trackers.figures import figures_of, rows_of, without_secrets
from millrace.train.trackers.process import END_SECONDS

MOST_BYTES = 2**25  # that wait for a process which does not read; a step's messages are below 100 KB

logger = logging.getLogger(__name__)


def require_trackers(config: RunConfig) -> None:
    """Raise ConfigError, which names the extra, if the package of a tracker is not installed."""
    for kind in config.trackers.kinds:
        require_modules(f"trackers: {kind}", kind)


class Trackers:
    """The trackers of a run. Open them with `open_trackers`. state: how the run ends, unless an error ends it."""

    def __init__(self, processes: Sequence["TrackerProcess"] = ()) -> None:
        self.processes = processes
        self.state = RunState.FINISHED

    def resumed_at(self, step: int) -> None:
        """Say that the run continues after this step."""
        self._send("resumed_at", step)

    def figures(self, metrics: StepMetrics) -> None:
        """Record the figures of a step."""
        if self.processes:
            self._send("figures", metrics.step, figures_of(metrics))

    def samples(self, step: int, samples: Sequence[Sample], chat: ChatFormat) -> None:
        """Record some samples of a step."""
        if self.processes and (rows := rows_of(samples, chat)):
            self._send("samples", step, rows)

    def _send(self, *message: object) -> None:
        for process in self.processes:
            process.send(*message)


@asynccontextmanager
async def open_trackers(
    config: RunConfig, folder: RunFolder, *, resume: bool, display: Display
) -> AsyncIterator[Trackers]:
    """Start the trackers of the settings, and end them with the state in which the block ends.

    What fails is logged. folder: with its config.yaml. resume: continue the runs that the trackers had before.
    """
    ids = _read_ids(folder.path / "trackers.json") if resume else {}
    processes = []
    state = RunState.FAILED
    try:
        for kind in config.trackers.kinds:
            run = TrackedRun(
                config.name,
                config.trackers.project,
                folder.path.absolute(),
                without_secrets(config.model_dump(mode="json")),
                ids.get(kind),
                resume,
            )
            if (process := await TrackerProcess.start(kind, run, folder, ids, display)) is not None:
                processes.append(process)
        trackers = Trackers(processes)
        yield trackers
        state = trackers.state
    except asyncio.CancelledError:
        state = RunState.INTERRUPTED
        raise
    finally:
        if processes:
            display.phase("waiting for the trackers")
        await asyncio.gather(*(process.end(state) for process in processes))


class TrackerProcess:
    """The process of one tracker."""

    def __init__(
        self,
        kind: str,
        process: asyncio.subprocess.Process,
        log: Path,
        ids: dict[str, str],
        ids_path: Path,
        display: Display,
    ) -> None:
        assert process.stdin is not None
        self.kind = kind
        self._process, self._input, self._log = process, process.stdin, log
        self._ids, self._ids_path, self._display = ids, ids_path, display
        self._ended = self._hangs = False
        self._listening = asyncio.create_task(self._listen())

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    @classmethod
    async def start(
        cls, kind: str, run: TrackedRun, folder: RunFolder, ids: dict[str, str], display: Display
    ) -> "TrackerProcess | None":
        """Start the process, and with it the run at the tracker. Return None if it can't be started."""
        path = folder.logs / f"tracker-{kind}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_private(path) as log:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "millrace.train.trackers.process", kind),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C goes only to the trainer, which says how the run ends
                )
        except OSError as error:
            logger.warning("tracker %s could not be started: %s; the run continues without it", kind, error)
            return None
        started = cls(kind, process, path, ids, folder.path / "trackers.json", display)
        started.send("start", asdict(run) | {"folder": str(run.folder)})
        return started

    def send(self, *message: object) -> None:
        """Send a message, if the process still runs and reads. Never waits."""
        if self._hangs or self._input.is_closing():
            return
        if self._input.transport.get_write_buffer_size() > MOST_BYTES:
            self._hangs = True
            self._warn("it hangs, and records nothing more")
            return
        self._input.write(json.dumps(message, default=float).encode() + b"\n")  # rewards may be NumPy's

    async def end(self, state: RunState) -> None:
        """Let the tracker end its run, for END_SECONDS."""
        self.send("end", state.value)
        self._input.close()
        try:
            async with asyncio.timeout(END_SECONDS):
                await asyncio.shield(self._listening)
        except TimeoutError:
            self._ended = True
            self._warn(f"it did not end within {END_SECONDS:.0f} s, and may lack the last steps")
        finally:
            if self._process.returncode is None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(self._process.pid, signal.SIGKILL)
            await self._listening

    async def _listen(self) -> None:
        """Read what the process says, up to its end."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said: dict[str, Any] = json.loads(line)
            if started := said.get("started"):
                if started["id"] is not None:
                    self._keep_id(started["id"])
                self._display.say(f"{self.kind}: {started['where']}")
            if warning := said.get("warning"):
                self._warn(warning)
            if lost := said.get("lost"):
                self._warn(f"{lost} of its calls failed")
            self._ended = self._ended or said.get("ended", False)
        status = await self._process.wait()
        self._input.close()
        if not self._ended:
            self._warn(f"its process ended with status {status}, and records nothing more")

    def _keep_id(self, of_tracker: str) -> None:
        """Write down the id by which a resumed run continues."""
        self._ids[self.kind] = of_tracker
        beside = self._ids_path.with_suffix(".partial")
        try:
            beside.write_text(json.dumps(self._ids) + "\n")
            beside.replace(self._ids_path)
        except OSError as error:
            self._warn(f"{self._ids_path} can't be written ({error.strerror}); a resumed run will be a new one there")

    def _warn(self, what: str) -> None:
        logger.warning("tracker %s: %s. The run continues; read %s for the details", self.kind, what, self._log)


def _read_ids(path: Path) -> dict[str, str]:
    try:
        ids = json.loads(path.read_text())
    except (OSError, ValueError):  # it is missing, or torn
        return {}
    return {str(kind): str(of_tracker) for kind, of_tracker in ids.items()} if isinstance(ids, dict) else {}
