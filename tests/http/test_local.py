"""Which errors come from this process or its host, and how the proxy variables of the environment are read."""

import errno
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import EngineFailed, EngineTimeout, EngineUnreachable, LocalError
from millrace.fleet.replica_state import Quarantined, WeightsLost, verdict
from millrace.http.local import lacking
from millrace.http.proxies import LOOPBACK, reaching_loopback

LOCAL = ("EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "EADDRNOTAVAIL", "ENETDOWN", "ENOSPC", "EDQUOT")
NAMES = st.text("abcxyz019.-", min_size=1)


@pytest.mark.parametrize("name", sorted(errno.errorcode.values()))
def test_only_a_local_shortage_is_a_local_error(name: str) -> None:
    number = getattr(errno, name)
    local = {getattr(errno, one) for one in LOCAL}
    assert (lacking(OSError(number, name)) is not None) == (number in local)


@pytest.mark.parametrize(
    ("second", "local"),
    [("EMFILE", True), ("ENOBUFS", True), ("EADDRNOTAVAIL", False), ("ENETDOWN", False), ("EHOSTUNREACH", False)],
)
def test_a_shortage_at_one_of_several_addresses_is_local(second: str, local: bool) -> None:
    number = getattr(errno, second)
    error = OSError(
        f"Multiple exceptions: [Errno {errno.ECONNREFUSED}] refused, [Errno {number}] {os.strerror(number)}"
    )
    assert (lacking(error) is not None) is local


def test_memory_and_names_are_local() -> None:
    assert lacking(MemoryError()) == "no memory is left"
    assert "can't be resolved" in (lacking(socket.gaierror(socket.EAI_NONAME, "unknown")) or "")
    assert lacking(ValueError("other")) is None


def test_no_engine_is_distrusted_for_a_local_error() -> None:
    assert verdict(LocalError("e0", "no memory is left")) == WeightsLost()
    for error in (EngineFailed("e0", "x"), EngineTimeout("e0", "x"), EngineUnreachable("e0", "x", sent=True)):
        assert isinstance(verdict(error), Quarantined)


@given(lower=st.lists(NAMES), upper=st.lists(NAMES))
def test_loopback_is_added_to_what_the_user_excludes_from_proxies(lower: list[str], upper: list[str]) -> None:
    before = {"http_proxy": "http://proxy:3128", "no_proxy": ",".join(lower), "NO_PROXY": ", ".join(upper)}
    after = reaching_loopback(before)
    assert after["no_proxy"] == after["NO_PROXY"]
    assert {*lower, *upper, *LOOPBACK} == set(after["no_proxy"].split(","))
    assert after["http_proxy"] == "http://proxy:3128"
