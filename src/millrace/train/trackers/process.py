"""The process of one tracker: `python -m millrace.train.trackers.process KIND`.

It reads one message a line from its standard input, such as `["figures", 3, {...}]`, whose first item is the name of a
method of `Tracker`. It answers with lines of `{"started": ...}`, `{"warning": ...}` and `{"ended": true}`. What the
tracker's package prints goes to the standard error. If the input closes without an end, as it does when the trainer is
killed, the run was interrupted. The kernel ends a process that still runs END_SECONDS after the end of its input.
"""

import importlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from millrace.train.trackers.base import RunState, TrackedRun, Tracker

CLASSES: Mapping[str, str] = {
    "tensorboard": "TensorBoardTracker",
    "wandb": "WandbTracker",
    "mlflow": "MLflowTracker",
    "trackio": "TrackioTracker",
}
END_SECONDS = 60.0  # for what is still to be sent when the run has ended
MOST_WAITING = 1000  # messages, which are two a step; a package that hangs must not fill the memory

Message = list[Any]


def main() -> None:
    """Record the run that the standard input describes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # clusters send them to all processes of a job
        signal.signal(number, signal.SIG_IGN)  # the trainer says how and when the run ends
    kind = sys.argv[1]
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    messages: queue.Queue[Message] = queue.Queue(MOST_WAITING)
    threading.Thread(target=_read, args=(sys.stdin.buffer, messages, out), daemon=True).start()
    work(kind, messages, out)
    os._exit(0)  # packages wait for their networks in hooks of the interpreter's end


def work(kind: str, messages: "queue.Queue[Message]", out: BinaryIO) -> None:
    """Start the tracker by the first message, and pass it the others up to the end."""
    [_, run] = messages.get()
    run = TrackedRun(**{**run, "folder": Path(run["folder"])})
    tracker_class: type[Tracker] | None = None
    try:
        module = importlib.import_module(f"millrace.train.trackers.{kind}")
        tracker_class = getattr(module, CLASSES[kind])
        tracker = tracker_class.start(run)
    except Exception as error:  # whatever a package raises, the trainer's user should read it
        advice = f"; {tracker_class.advice}" if tracker_class is not None else ""
        say(out, warning=f"it could not start: {first_line(error)}{advice}", ended=True)
        return
    say(out, started={"id": tracker.id, "where": tracker.where})
    failed = 0
    while True:
        method, *arguments = messages.get()
        try:
            if method == "end":
                tracker.end(RunState(*arguments))
                say(out, lost=failed, ended=True)
                return
            getattr(tracker, method)(*arguments)
        except Exception as error:
            failed += 1
            if failed == 1:
                say(out, warning=f"it did not take {method} of step {arguments[0]}: {first_line(error)}")
            if method == "end":
                say(out, lost=failed, ended=True)
                return


def say(out: BinaryIO, **message: object) -> None:
    """Write a line to the trainer, if it still lives."""
    try:
        out.write(json.dumps(message).encode() + b"\n")
    except BrokenPipeError:
        return


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, below its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__


def _read(file: BinaryIO, messages: "queue.Queue[Message]", out: BinaryIO) -> None:
    """Read the messages. What comes while too many wait is dropped, and said once."""
    end: Message = ["end", RunState.INTERRUPTED.value]
    dropped = False
    for line in file:
        message = json.loads(line)
        if message[0] == "end":
            end = message
        elif not messages.full():
            messages.put(message)
        elif not dropped:
            dropped = True
            say(out, warning=f"it hangs: {MOST_WAITING} messages wait, and more are dropped")
    signal.setitimer(signal.ITIMER_REAL, END_SECONDS)  # the kernel ends a process that does not take this signal
    messages.put(end)


if __name__ == "__main__":
    main()
