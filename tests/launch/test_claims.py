"""Claims on attached servers: one process of this host at a time, until it ends, however it ends."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from millrace.errors import LaunchError
from millrace.launch.claims import claimed_servers
from millrace.launch.ports import free_port

HOLD = """
import sys, time
from millrace.launch.claims import claimed_servers
with claimed_servers([sys.argv[1]]):
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def url() -> str:
    return f"http://127.0.0.1:{free_port('127.0.0.1')}"


def test_a_second_claim_names_the_process_that_holds_the_first(url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, url], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "claimed\n"
            says = rf"^process {holder.pid} owns the engine at {url}, .*end it first$"
            with pytest.raises(LaunchError, match=says), claimed_servers([url]):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
        holder.wait()
    with claimed_servers([url]):
        pass


def test_all_names_of_a_server_are_one_claim_and_a_failure_leaves_none(url: str) -> None:
    port, other = url.rpartition(":")[2], f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with claimed_servers([url]):
        for same in (url, f"http://localhost:{port}/"):
            with (
                pytest.raises(LaunchError, match="^this process already owns the engine at"),
                claimed_servers([other, same]),
            ):
                pass
        with claimed_servers([other]):
            pass
    with claimed_servers([url, other]):
        pass


def test_a_forked_child_does_not_keep_the_claim_of_its_parent(url: str) -> None:
    fork = multiprocessing.get_context("fork")
    theirs, ours = fork.Pipe()

    def wait() -> None:
        theirs.send("runs")
        theirs.recv()
        os._exit(0)

    with claimed_servers([url]):
        child = fork.Process(target=wait)
        child.start()
        assert ours.recv() == "runs"
    try:
        assert child.is_alive()
        with claimed_servers([url]):
            pass
    finally:
        ours.send("end")
        child.join()
