"""The limits of this process and this host: the errors they cause, and the number of open files."""

import errno
import os
import re
import resource
import socket

# The limit for a process that has none. Some programs loop over all possible descriptors, which would take minutes.
MOST_FILES = 2**20
# File descriptors that data calls leave for control calls, logs, checkpoints and libraries: a quarter of the limit, up
# to this many.
MOST_RESERVED_FILES = 256

_LACKING = {
    errno.ENFILE: "this host has reached its limit of open files (fs.file-max)",
    errno.ENOMEM: "no memory is left",
    errno.ENOBUFS: "the kernel has no buffer space left",
    errno.EADDRNOTAVAIL: "no local address or port is left for another connection (net.ipv4.ip_local_port_range)",
    errno.ENETDOWN: "the network interface is down",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
}
# A name with several addresses gives one error for all of them: "Multiple exceptions: [Errno 111] ..., [Errno 24] ...".
# An address that this host can't reach, such as ::1 without IPv6, does not make it a local error. A shortage does.
_NUMBER = re.compile(r"\[Errno (\d+)\]")
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def lacking(error: BaseException) -> str | None:
    """Return the resource that this process or its host lacked, in words.

    Returns None if the other side may have caused the error.
    """
    if isinstance(error, MemoryError):
        return _LACKING[errno.ENOMEM]
    if not isinstance(error, OSError):
        return None
    if isinstance(error, socket.gaierror):
        return f"the host name can't be resolved: {error.strerror}"
    if error.errno is None:
        numbers = _SHORTAGES.intersection(map(int, _NUMBER.findall(str(error))))
        return _words(min(numbers)) if numbers else None
    return _words(error.errno)


def _words(number: int) -> str | None:
    if number == errno.EMFILE:
        return (
            f"this process has reached its limit of open files ({file_limit()}); raise `ulimit -n`, or run fewer "
            "requests at once"
        )
    return _LACKING.get(number)


def file_limit() -> int:
    """Return the number of files that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit, which needs no privilege. Child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def data_socket(family: int, kind: int, protocol: int) -> socket.socket:
    """Return a socket for a call that can wait. Raises OSError (EMFILE) if only the reserved descriptors are left.

    The kernel gives out the lowest free descriptor, so its number shows how many are in use.
    """
    sock = socket.socket(family, kind, protocol)
    limit = file_limit()
    if sock.fileno() >= limit - min(limit // 4, MOST_RESERVED_FILES):
        sock.close()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return sock
