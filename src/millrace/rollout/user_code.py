"""The user's own functions and classes: loaded from a file or a module, and named in errors."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from millrace.config.explain import nearest
from millrace.errors import ConfigError


def load_code(path: str, name: str, setting: str) -> Any:
    """Return the function or class `name` of a Python file or module. `setting` names it in error messages.

    Raises ConfigError, in one line, if the file or the name is missing, or the code raises while it is imported.
    """
    where = f"{setting}: {path}"
    try:
        module = _module(path, where)
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{setting}: {error.filename}:{error.lineno}: {error.msg}") from error
    except BaseException as error:  # the user's code runs while it is imported
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(f"{where} can't be imported: {said(error)}") from error
    if not hasattr(module, name):
        hint = nearest(name, [other for other in vars(module) if not other.startswith("_")])
        raise ConfigError(f"{where} has no {name!r}{f'; {hint}' if hint else ''}")
    return getattr(module, name)


def place(path: str, name: str) -> str:
    """Return the file's name and the name in it, for error messages."""
    return f"{Path(path).name if path.endswith('.py') else path}:{name}"


def parameters(
    function: Callable[..., object], where: str, offered: Mapping[str, object] | Iterable[str]
) -> tuple[str, ...]:
    """Return the parameters of a function that are among those offered, which it is called with by keyword.

    Raises ConfigError if it requires another parameter, takes none of them, or has no readable signature.
    """
    offered = tuple(offered)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} is no function with a readable signature") from error
    taken = []
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in offered and parameter.kind is not parameter.POSITIONAL_ONLY:
            taken.append(name)
        elif parameter.default is parameter.empty:
            raise ConfigError(
                f"{where} requires the parameter {name!r}, which is not offered; it may name {', '.join(offered)}"
            )
    if not taken:
        raise ConfigError(f"{where} names none of its parameters: {', '.join(offered)}")
    return tuple(taken)


def said(error: BaseException, file: str | None = None) -> str:
    """Return an exception in one line: its type, its message, and the line of the user's file that raised it.

    file: the user's file. None takes the innermost place.
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is None or Path(frame.filename) == Path(file)]
    return f"{text} ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else text


def file_of(code: object) -> str | None:
    """Return the file that a function or class is written in; None if there is none."""
    try:
        return inspect.getsourcefile(code)  # type: ignore[arg-type]
    except TypeError:
        return None


def _module(path: str, where: str) -> ModuleType:
    if not path.endswith(".py"):
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # as `python -m` does, but last, so it hides no other module
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is not None and path.startswith(error.name):
                raise ConfigError(
                    f"{where} is no importable module: it is neither installed nor in the current folder; the path of "
                    "a file ends in .py"
                ) from error
            raise
    file = Path(path).absolute()
    if not file.is_file():
        raise ConfigError(f"{where}: there is no such file beside the config or in the current folder")
    name = f"millrace_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last, so the file can import its neighbours and hides no other module
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
