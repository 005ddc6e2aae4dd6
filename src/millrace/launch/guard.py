"""Stands between the one who launches and a server, so that the server's whole process tree ends with either of them.

    python guard.py GRACE_SECONDS LEFTOVERS COMMAND [ARGUMENT ...]

The launcher holds the other end of this program's standard input. When that closes (the launcher died, even by SIGKILL)
or SIGTERM comes, every process that descends from COMMAND gets SIGTERM, and after the grace SIGKILL. As a subreaper
(prctl(2)) the guard inherits the orphans of its tree, so none can slip away. COMMAND's temporary files go to a folder
with a short path, which is removed in the end; so is shared memory (in /dev/shm) whose name matches one of LEFTOVERS,
patterns with commas between them. The guard runs on the standard library alone, and exits as COMMAND did: its status,
or 128 and the signal's number.
"""

import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# A socket's path has at most 107 bytes: of these 18 are the folder's own name, and engines add up to 45.
LONGEST_PLACE = 44
SHORT_PLACES = ("/tmp", "/dev/shm", "/var/tmp")  # noqa: S108 # a folder with a random name is made there
MOST_FILES = 2**20
POLL_SECONDS = 0.5  # how soon the loss of the parent is seen where another process still holds the pipe


def prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def descendants() -> list[int]:
    """All living processes below this one; zombies are reaped on the way."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue  # it ended while we looked
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, queue = [], [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def send(pids: list[int], signum: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue  # it ended by itself


def end_tree(grace: float) -> None:
    """Ends all descendants: SIGTERM, then after the grace SIGKILL until none is left."""
    send(descendants(), signal.SIGTERM)
    deadline = time.monotonic() + grace
    while alive := descendants():
        if time.monotonic() >= deadline:
            send(alive, signal.SIGKILL)
        time.sleep(0.02)


def sweep(patterns: list[str], since: float) -> None:
    """Removes the shared memory that a killed tree left: of our user, from after `since`, mapped by no process.

    Whatever is younger than a second may be another server's that is about to map it, and stays.
    """
    found = {path for pattern in patterns for path in Path("/dev/shm").glob(pattern)}  # noqa: S108 # no temporary file
    if not found:
        return
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:
            continue  # it ended, or is another user's, and so are its files
        # By inode: whoever has just made a semaphore has it under the name that it had before it was given this one.
        mapped |= {int(line.split()[4]) for line in lines if "/dev/shm/" in line}  # noqa: S108 # no temporary file
    for path in found:
        try:
            status = path.stat()
            ours = status.st_uid == os.getuid() and since <= status.st_ctime < time.time() - 1
            if ours and status.st_ino not in mapped:
                path.unlink()
        except FileNotFoundError:
            continue  # another guard was faster


def wait(child: int, lifeline: int, wakeup: int, parent: int) -> int | None:
    """The child's wait status; None when the guard is to end it."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return status
        ready, _, _ = select.select([lifeline, wakeup], [], [], POLL_SECONDS)
        if wakeup in ready and signal.SIGTERM in os.read(wakeup, 64):
            return None
        if os.getppid() != parent or (lifeline in ready and os.read(lifeline, 64) == b""):
            return None


def short_place() -> str:
    """Where COMMAND's temporary folder is: below TMPDIR, or in a place of the system's where the paths of sockets there
    would be longer than a Unix socket's may be."""
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) <= LONGEST_PLACE:
        return place
    return next((short for short in SHORT_PLACES if os.access(short, os.W_OK | os.X_OK)), place)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="millrace-", dir=short_place(), ignore_cleanup_errors=True) as folder:
        return guard(float(sys.argv[1]), [name for name in sys.argv[2].split(",") if name], sys.argv[3:], folder)


def raise_file_limit() -> None:
    """Of this process, and so of the server below it: each request is an open connection. As
    `millrace.http.local.raise_file_limit`, which can't be imported here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def guard(grace: float, leftovers: list[str], command: list[str], folder: str) -> int:
    parent, began = os.getppid(), time.time()
    raise_file_limit()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wakeup, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    # SIGQUIT too: SGLang's processes send it to their parent when they fail, and the parent of an orphan is the guard.
    for signum in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT, signal.SIGQUIT):
        signal.signal(signum, lambda *_: None)  # the wake-up pipe tells wait()
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": folder},
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    except OSError as error:
        print(f"{command[0]} could not be started: {error}", file=sys.stderr)
        return 127
    status = wait(child.pid, 0, wakeup, parent)
    end_tree(grace)
    sweep(leftovers, began)
    if status is None:
        return 0
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
