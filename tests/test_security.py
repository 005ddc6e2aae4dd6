"""Nothing is unpickled, control routes accept only their key, and keys appear nowhere."""

import ast
from pathlib import Path

import aiohttp
import pytest

import millrace
from millrace.config import EmbeddedEngineConfig
from millrace.engines.embedded.adapter import EmbeddedEngine
from millrace.fleet.local import open_fleet

PACKAGE = Path(millrace.__file__).parent
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CONTROL = [
    "abort_request",
    "pause_generation",
    "continue_generation",
    "flush_cache",
    "release_memory_occupation",
    "resume_memory_occupation",
    "begin_weight_update",
    "end_weight_update",
    "abort_weight_update",
    "update_weights_from_shared_memory",
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "init_weights_update_group",
    "destroy_weights_update_group",
    "update_weight_version",
    "weights_checker",
    "inject_fault",
]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_unpickles_or_evaluates(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                assert not UNPICKLERS & {name.name.split(".")[0] for name in names}
            case ast.ImportFrom(module=module):
                assert (module or "").split(".")[0] not in UNPICKLERS
            case ast.Call(func=ast.Name(id=name)):
                assert name not in ("eval", "exec")
            case ast.Call(func=ast.Attribute(attr=name, value=ast.Name(id=owner))):
                assert (owner, name) != ("torch", "load")
                assert name not in (
                    "broadcast_object_list",
                    "all_gather_object",
                    "gather_object",
                    "scatter_object_list",
                )


async def test_control_routes_answer_only_to_the_key_that_only_the_launcher_knows(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = EmbeddedEngineConfig(kind="embedded", threads=1, faults=True)
    async with open_fleet(config, tiny_model, log_dir=tmp_path) as fleet:
        engine = fleet.engines["embedded-0"]
        assert isinstance(engine, EmbeddedEngine)
        assert engine.url.startswith("http://127.0.0.1:")
        data_key, control_key = engine._http._keys["data"], engine._http._keys["control"]
        assert data_key
        assert control_key
        async with aiohttp.ClientSession() as session:
            for route in CONTROL:
                for key in (None, "wrong", data_key):
                    headers = {"Authorization": f"Bearer {key}"} if key else {}
                    async with session.post(f"{engine.url}/{route}", json={}, headers=headers) as response:
                        assert response.status == 401, (route, key)
            async with session.post(f"{engine.url}/generate", json={}) as response:
                assert response.status == 401
        readable = command_lines() + logs(tmp_path)
        assert "embedded" in readable
        assert data_key not in readable
        assert control_key not in readable


def command_lines() -> str:
    """Returns the command lines of all processes of this machine."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().decode(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return "".join(lines)


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*.log"))
