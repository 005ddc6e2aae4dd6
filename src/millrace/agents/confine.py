"""Runs a command with limits on its processes.

    python confine.py MEMORY PROCESSES COMMAND [ARGUMENT ...]

MEMORY: bytes that each process may allocate, or 0 for no limit. PROCESSES: how many may run at a time, or 0. With more,
all are ended, and the exit status is 125. The kernel's own limit on processes (RLIMIT_NPROC) counts all of the user's,
the trainer's included, and none of root's, so this program counts them itself. It uses only the standard library. Its
exit status is that of the command, or 128 plus the signal's number.
"""

import ctypes
import os
import resource
import signal
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
TOO_MANY, NOT_STARTED = 125, 127
INTERVAL = 0.1


def main() -> int:
    memory, most, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    if not most:
        _exec(command)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans are counted, too
    child = os.fork()
    if not child:
        _exec(command)
    while (status := _reaped(child)) is None:
        if len(_below(os.getpid())) > most:
            print(f"it had more than {most} processes, and was ended (agent.limits.processes)", file=sys.stderr)
            _end_all()
            return TOO_MANY
        time.sleep(INTERVAL)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _exec(command: list[str]) -> None:
    try:
        os.execvp(command[0], command)  # noqa: S606 # the user's command, with its arguments
    except OSError as error:
        print(f"{command[0]} could not be started: {error}", file=sys.stderr, flush=True)
        os._exit(NOT_STARTED)


def _reaped(child: int) -> int | None:
    """Reap the processes that have ended, and return the command's wait status if it is one of them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


def _below(pid: int) -> list[int]:
    """Return the processes below one, as the kernel lists the children of each of its threads."""
    found: list[int] = []
    queue = [pid]
    while queue:
        folder = f"/proc/{queue.pop()}/task"
        try:
            for thread in os.listdir(folder):
                with open(f"{folder}/{thread}/children") as file:
                    queue += (children := [int(number) for number in file.read().split()])
                    found += children
        except OSError:
            continue  # it ended meanwhile
    return found


def _end_all() -> None:
    """Stop all processes below this one, so that they start no others, and end them."""
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        while pids := _below(os.getpid()):
            for pid in pids:
                try:
                    os.kill(pid, signum)
                except ProcessLookupError:
                    continue
            if signum == signal.SIGSTOP and len(_below(os.getpid())) == len(pids):
                break
            _reaped(0)


if __name__ == "__main__":
    sys.exit(main())
