"""The account that processes run under, even if /etc/passwd has no entry for it. A container may run as any uid."""

import os
import pwd
import tempfile
from collections.abc import Mapping
from pathlib import Path


def account_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that a child process needs if its uid has no entry in the passwd database.

    They are a user name, which torch asks for, and a writable home folder, as far as `environment` lacks them. The
    result is empty if the uid has an entry.
    """
    uid = os.getuid()
    try:
        pwd.getpwuid(uid)
    except KeyError:
        pass
    else:
        return {}
    name = f"uid-{uid}"
    added = {variable: name for variable in ("USER", "LOGNAME") if not environment.get(variable)}
    home = environment.get("HOME")
    if not home or not os.access(home, os.W_OK | os.X_OK):
        added["HOME"] = str(_own_folder(uid))
    return added


def account_name() -> str:
    """Return the user's name, or `uid-N` if the uid has no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid-{os.getuid()}"


def _own_folder(uid: int) -> Path:
    """Return a home folder for this uid. It stays the same across starts, so engines find their caches in it.

    A new temporary folder is used if another user owns the folder of that name.
    """
    folder = Path(tempfile.gettempdir()) / f"millrace-home-{uid}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != uid:
        return Path(tempfile.mkdtemp(prefix=f"millrace-home-{uid}-"))
    return folder
