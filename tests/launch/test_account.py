"""The account of processes whose uid has no entry in the passwd database."""

import os
import pwd
import stat
from pathlib import Path

import pytest

from millrace.launch.account import account_environment, account_name


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Makes the uid unknown, and returns the folder for temporary files."""

    def missing(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", missing)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_known_account_lacks_nothing() -> None:
    assert account_environment({}) == {}
    assert account_name() == pwd.getpwuid(os.getuid()).pw_name


def test_an_unknown_account_gets_a_name_and_a_home_of_its_own(unknown: Path) -> None:
    name = f"uid-{os.getuid()}"
    added = account_environment({})
    assert account_name() == added["USER"] == added["LOGNAME"] == name
    home = Path(added["HOME"])
    assert home.parent == unknown
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert account_environment({}) == added  # the next start gets the same, since engines cache files there


def test_variables_of_the_environment_stay(unknown: Path) -> None:
    assert account_environment({"USER": "me", "LOGNAME": "me", "HOME": str(unknown)}) == {}
    added = account_environment({"USER": "me", "LOGNAME": "me", "HOME": str(unknown / "nowhere")})
    assert added.keys() == {"HOME"}


def test_a_home_that_another_account_has_put_there_is_left_alone(unknown: Path) -> None:
    (unknown / "elsewhere").mkdir()
    (unknown / f"millrace-home-{os.getuid()}").symlink_to(unknown / "elsewhere")
    home = Path(account_environment({})["HOME"])
    assert home.parent == unknown
    assert not home.is_symlink()
    assert home.name != f"millrace-home-{os.getuid()}"
