"""Locks of files and folders, which the kernel releases when their process ends."""

import fcntl


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder for this process alone. Return False if another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
