"""A fleet whose own process may open few files, with real engines on IPv4 and IPv6."""

import asyncio
import json
import socket
import sys
from pathlib import Path

import pytest

FILES, REQUESTS = 256, 1000


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=pytest.mark.slow)])
async def test_no_engine_is_blamed_for_files_that_its_client_lacks(tiny_model: Path, tmp_path: Path, host: str) -> None:
    if host == "::1" and not _has_ipv6_loopback():
        pytest.skip("this machine has no address ::1")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fleet.few_files", tiny_model, tmp_path, host, str(FILES), str(REQUESTS),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), 300)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    result = json.loads(out)
    assert result["lengths"] == [4] * REQUESTS
    [[url, phase, failures]] = result["members"]
    assert url.startswith(f"http://[{host}]:" if ":" in host else f"http://{host}:")
    assert (phase, failures) == ("ready", 0)
    assert "reached its limit of open files (256)" in err.decode()  # the client did reach its limit


def _has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True
