"""Limits of this process and this host: which errors come from them, and how many files may be open."""

import errno
import os
import re
import resource
import socket

# A process without a limit gets this one. Programs that go through all possible descriptors take minutes otherwise.
MOST_FILES = 2**20
# Of the limit, what connections for generating leave to control calls, logs, checkpoints and libraries: a quarter, up
# to this many.
MOST_RESERVED_FILES = 256

_LACKING = {
    errno.ENFILE: "this host has as many files open as it may (fs.file-max)",
    errno.ENOMEM: "no memory is left",
    errno.ENOBUFS: "the kernel has no buffer space left",
    errno.EADDRNOTAVAIL: "no local address or port is left for another connection (net.ipv4.ip_local_port_range)",
    errno.ENETDOWN: "the network interface is down",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
}
# A name with several addresses gives one error for all: "Multiple exceptions: [Errno 111] ..., [Errno 24] ...". One
# address that this host can't reach, such as ::1 without IPv6, does not make the error a local one; a shortage does.
_NUMBER = re.compile(r"\[Errno (\d+)\]")
_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


def lacking(error: BaseException) -> str | None:
    """What this process or its host lacked, in words. None for an error that the other side may have caused."""
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
        return f"this process has as many files open as it may ({file_limit()}); raise `ulimit -n`, or ask for less"
    return _LACKING.get(number)


def file_limit() -> int:
    """How many files this process may have open now."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


def raise_file_limit() -> None:
    """Raises the soft limit of open files to the hard limit, which every process may do. What it starts inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def data_socket(family: int, kind: int, protocol: int) -> socket.socket:
    """A socket for a call that can wait. Raises OSError (EMFILE) where only the reserved descriptors are left: the
    kernel hands out the lowest free number, so the number says how many are in use."""
    sock = socket.socket(family, kind, protocol)
    limit = file_limit()
    if sock.fileno() >= limit - min(limit // 4, MOST_RESERVED_FILES):
        sock.close()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return sock
