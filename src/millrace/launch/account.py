"""The account that processes run under, also where /etc/passwd does not have it: a container may run as any uid."""

import os
import pwd
import tempfile
from collections.abc import Mapping
from pathlib import Path


def account_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process of ours lacks in `environment` because its uid has no entry in the passwd database: a name, which
    torch asks for, and a home folder that can be written to. Empty where the uid has an entry."""
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
    """The user's name, or one that is made of the uid."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid-{os.getuid()}"


def _own_folder(uid: int) -> Path:
    """The same from one start to the next, for what engines cache. A folder of that name that is another user's is left
    alone."""
    folder = Path(tempfile.gettempdir()) / f"millrace-home-{uid}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != uid:
        return Path(tempfile.mkdtemp(prefix=f"millrace-home-{uid}-"))
    return folder
