"""A guard process between the launcher and a server. It ends the server's whole process tree when either of them ends.

    python guard.py GRACE_SECONDS LEFTOVERS COMMAND [ARGUMENT ...]

The launcher holds the other end of the guard's standard input. When that closes (the launcher died, even by SIGKILL),
or the guard receives SIGTERM, every descendant of COMMAND gets SIGTERM, and SIGKILL after the grace period. If the
launcher has written a line "CLAIM SECONDS", the guard waits longer: until no process has held the claim of that name
(`millrace.launch.claims`) for so many seconds. So another process can take the server over. The guard is a subreaper
(prctl(2)): it inherits the orphans of its tree, so no process escapes. COMMAND's temporary files go to a folder with a
short path, which the guard removes at the end. It also removes shared memory (in /dev/shm) whose name matches one of
LEFTOVERS, a comma-separated list of patterns. The guard uses only the standard library. Its exit status is that of
COMMAND, or 128 plus the signal's number.
"""

import ctypes
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# A socket's path has at most 107 bytes. The folder's own name takes 18 of them, and engines add up to 45.
LONGEST_PLACE = 44
SHORT_PLACES = ("/tmp", "/dev/shm", "/var/tmp")  # noqa: S108 # a folder with a random name is made there
MOST_FILES = 2**20
POLL_SECONDS = 0.5  # how soon the parent's death is noticed if another process still holds the pipe


def prctl(option: int, value: int) -> None:
    """Call prctl(2). Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def descendants() -> list[int]:
    """Return the ids of all living descendants of this process. Zombie children are reaped."""
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
                continue  # it ended during the scan
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, queue = [], [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def send(pids: list[int], signum: int) -> None:
    """Send a signal to processes. Those that have ended are ignored."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue  # it ended by itself


def end_tree(grace: float) -> None:
    """End all descendants: SIGTERM first, then SIGKILL after `grace` seconds until none is left."""
    send(descendants(), signal.SIGTERM)
    deadline = time.monotonic() + grace
    while alive := descendants():
        if time.monotonic() >= deadline:
            send(alive, signal.SIGKILL)
        time.sleep(0.02)


def sweep(patterns: list[str], since: float) -> None:
    """Remove the shared memory that a killed process tree left in /dev/shm.

    A file is removed if it belongs to this user, is newer than `since` (in Unix seconds), and is mapped by no process.
    Files younger than a second are kept: another server may be about to map them.
    """
    found = {path for pattern in patterns for path in Path("/dev/shm").glob(pattern)}  # noqa: S108 # no temporary file
    if not found:
        return
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:
            continue  # it ended, or belongs to another user, as its files do
        # By inode: a process that has just created a semaphore maps it under its earlier, temporary name.
        mapped |= {int(line.split()[4]) for line in lines if "/dev/shm/" in line}  # noqa: S108 # no temporary file
    for path in found:
        try:
            status = path.stat()
            ours = status.st_uid == os.getuid() and since <= status.st_ctime < time.time() - 1
            if ours and status.st_ino not in mapped:
                path.unlink()
        except FileNotFoundError:
            continue  # another guard has removed it


class Kept:
    """The time after the launcher's death. `line`: what the launcher wrote, the name of a claim and seconds."""

    def __init__(self, line: bytes) -> None:
        claim, seconds = line.split()
        self.claim, self.seconds, self.owned_at = b"\0" + claim, float(seconds), time.monotonic()

    def expired(self) -> bool:
        """Return whether no process has held the claim for `seconds`."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self.claim)
            except BlockingIOError:
                self.owned_at = time.monotonic()  # the owner does not accept connections, and its queue is full
            except OSError:
                return time.monotonic() - self.owned_at > self.seconds
            else:
                self.owned_at = time.monotonic()
        return False


def wait(child: int, lifeline: int, wakeup: int, parent: int) -> int | None:
    """Wait for the child and return its wait status. Returns None if the guard should end the child."""
    kept, orphaned = None, False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return status
        ready, _, _ = select.select([wakeup] if orphaned else [wakeup, lifeline], [], [], POLL_SECONDS)
        if wakeup in ready and signal.SIGTERM in os.read(wakeup, 64):
            return None
        if not orphaned:
            line = os.read(lifeline, 512) if lifeline in ready else None
            if line:
                kept = Kept(line)
            orphaned = line == b"" or os.getppid() != parent
            if orphaned and kept is not None:
                kept.owned_at = time.monotonic()
        if orphaned and (kept is None or kept.expired()):
            return None


def short_place() -> str:
    """Return the parent of COMMAND's temporary folder.

    It is TMPDIR, or a system folder if the paths of Unix sockets below TMPDIR would be too long.
    """
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) <= LONGEST_PLACE:
        return place
    return next((short for short in SHORT_PLACES if os.access(short, os.W_OK | os.X_OK)), place)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="millrace-", dir=short_place(), ignore_cleanup_errors=True) as folder:
        return guard(float(sys.argv[1]), [name for name in sys.argv[2].split(",") if name], sys.argv[3:], folder)


def raise_file_limit() -> None:
    """Raise the limit of open files of this process and of the server below it. Each request is an open connection.

    This is a copy of `millrace.http.local.raise_file_limit`, since the guard can't import Millrace.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def guard(grace: float, leftovers: list[str], command: list[str], folder: str) -> int:
    """Run `command` with TMPDIR set to `folder`, clean up after it, and return the guard's exit status."""
    parent, began = os.getppid(), time.time()
    raise_file_limit()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wakeup, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    # SIGQUIT too: SGLang's processes send it to their parent when they fail, and the guard is the parent of orphans.
    for signum in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT, signal.SIGQUIT):
        signal.signal(signum, lambda *_: None)  # wait() reads the signals from the wake-up pipe
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
