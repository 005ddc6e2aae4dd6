"""Unknown hosts: every place that takes a host reports an unknown one in a single line, with the setting's name and the
host, before anything starts."""

import os
import sys
from pathlib import Path

import pytest

from millrace.cli import main
from millrace.config import EmbeddedEngineConfig
from millrace.config.engines import SGLangEngineConfig
from millrace.config.routers import SGLangRouterConfig
from millrace.errors import ConfigError, LaunchError
from millrace.fleet.follower import follow_fleet
from millrace.fleet.local import open_fleet
from millrace.http.hosts import require_known
from millrace.launch.ports import free_port

UNKNOWN = "http://no-such-host.invalid:3000"
EMBEDDED = EmbeddedEngineConfig(kind="embedded")
SAYS = f"the host no-such-host.invalid of {UNKNOWN} can't be resolved: ."


async def test_hosts_that_are_known_are_taken() -> None:
    await require_known("urls", ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost"])


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64, "y" * 300])
async def test_an_unknown_name_is_reported_with_its_setting(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^urls: .*(can't be resolved: .|is not a server's URL)"):
        await require_known("urls", [f"http://{host}:3000"])


@pytest.mark.parametrize("setting", ["engine.urls", "router.url", "publish.sidecars"])
async def test_a_fleet_names_the_setting(tiny_model: Path, tmp_path: Path, setting: str) -> None:
    engine = SGLangEngineConfig(kind="sglang", urls=(UNKNOWN,)) if setting == "engine.urls" else EMBEDDED
    router = SGLangRouterConfig(kind="sglang", url=UNKNOWN) if setting == "router.url" else None
    sidecars = [UNKNOWN] if setting == "publish.sidecars" else []
    with pytest.raises(ConfigError, match=f"^{setting}: {SAYS}"):
        async with open_fleet(engine, tiny_model, log_dir=tmp_path, router=router, sidecars=sidecars):
            pass
    assert not os.listdir(tmp_path)


async def test_a_follower_names_its_argument() -> None:
    with pytest.raises(ConfigError, match=f"^url: {SAYS}"):
        async with follow_fleet(UNKNOWN, "key"):
            pass


@pytest.mark.parametrize("command", ["status", "doctor"])
def test_a_command_names_its_argument(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["millrace", command, UNKNOWN])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: URL: {SAYS[:-1]}")


def test_an_address_of_another_host_is_reported_with_its_setting() -> None:
    says = r"^no port of engine.host 192.0.2.1 is available: 192.0.2.1 is not an address of"
    with pytest.raises(LaunchError, match=says):
        free_port("192.0.2.1", "engine.host")
    with pytest.raises(LaunchError, match=r"^no port of 192.0.2.1 is available"):
        free_port("192.0.2.1")
