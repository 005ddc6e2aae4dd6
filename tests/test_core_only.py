"""Without the extras, the core alone drives engines with frozen weights. Everything else names the extra that it
needs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.imports import EXTRAS

# This runs before anything else in the process and hides the modules of the extras.
HIDE = f"""
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set().union(*EXTRAS.values())!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def without_extras(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDE + code],
        cwd=folder,
        env={**os.environ, "MILLRACE_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


CONFIG = """\
name: run
model: {kind: tiny}
engine: {kind: embedded}
data: {kind: generated, seed: 1, problems: 4}
rollout: {groups_per_step: 1, samples_per_group: 2, max_turn_tokens: 8, max_sample_tokens: 99}
train: {steps: 1, lr: 1e-3}
evaluation: {data: {kind: generated, seed: 1, problems: 4}}
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "run.yaml"), "pip install 'millrace[train]'"),
        (("sidecar",), "pip install 'millrace[train]'"),
        (("sidecar", "--store", "s", "--folder", "f"), "pip install 'millrace[train]'"),
        (("train", "run.yaml", "--dry-run"), "pip install 'millrace[train]'"),
        (("view", "runs"), "pip install 'millrace[view]'"),
        (("view", "-h"), None),
        (("config",), None),
        (("engines", "list"), None),
        (("engines", "-h"), None),
        (("doctor", "-h"), None),
        (("status", "-h"), None),
        (("version",), None),
    ],
)
def test_a_command_works_without_the_extras_or_names_one(
    arguments: tuple[str, ...], says: str | None, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    done = without_extras(f"sys.argv[1:] = {list(arguments)}\nfrom millrace.cli import main\nmain()", tmp_path)
    if says is None:
        assert done.returncode in (0, None), done.stderr
    else:
        assert done.returncode == 1
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_an_integration_names_its_extra(tmp_path: Path) -> None:
    done = without_extras("import millrace.integrations.trl", tmp_path)
    assert done.stderr.splitlines()[-1].endswith(
        "ConfigError: millrace.integrations.trl: trl is not installed: pip install 'millrace[trl]'"
    )


OPEN = """
import asyncio
from pathlib import Path
from millrace import *
from millrace.errors import ConfigError

async def main():
    async with open_fleet({config}, Path("model"), log_dir=Path("logs"), {settings}):
        pass

try:
    asyncio.run(main())
except ConfigError as error:
    print(error)
"""
EMBEDDED = 'EmbeddedEngineConfig(kind="embedded")'


@pytest.mark.parametrize(
    ("config", "settings", "says"),
    [
        (EMBEDDED, "", r"the embedded engine: torch is not installed: pip install 'millrace\[train\]'"),
        (EMBEDDED, "folder='versions'", r"a store of versions \(versions\): \w+ is not installed: .*millrace\[train\]"),
        ('VLLMEngineConfig(kind="vllm", device="cpu", kv_events=True)', "", r"pip install 'millrace\[kv-events\]'"),
    ],
)
def test_a_fleet_that_needs_an_extra_names_it(
    config: str, settings: str, says: str, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "model").symlink_to(tiny_model)
    done = without_extras(OPEN.format(config=config, settings=settings), tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert re.search(says, done.stdout)
