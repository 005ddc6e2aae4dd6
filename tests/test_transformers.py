"""The lowest transformers version that pyproject.toml allows, in an environment of its own. The embedded engine
generates and takes weights, and the trainer takes steps. The other tests use the version of this environment."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from millrace.engines import environments

ROOT = Path(__file__).parent.parent
INSTALL_DEADLINE, RUN_DEADLINE = 600.0, 400.0  # seconds; 20 and 30 on a quiet machine
SLICE = (
    "tests/engines/embedded/test_models.py::test_logprobs_are_those_of_a_full_forward",
    "tests/fleet/test_dtypes.py::test_every_transport_sends_the_cast_tensors",
    "tests/train/test_trainer.py::test_a_rewarded_token_becomes_likelier",
    "tests/train/test_policy.py::test_gradient_checkpointing_computes_layers_twice_and_changes_nothing",
    "tests/test_model_config.py::test_a_vocabulary",
)


def lowest() -> str:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    [version] = [found[1] for need in extra if (found := re.fullmatch(r"transformers>=([\d.]+)", need))]
    return version


@pytest.fixture(scope="module")
def python() -> Path:
    """Returns an interpreter with this version and its dependencies. All other packages come from this environment. It
    is made if it is missing, and kept in the cache beside the engines' environments."""
    outer = sysconfig.get_path("purelib")
    key = hashlib.sha256(f"{outer} {sys.version}".encode()).hexdigest()[:8]
    place = environments.environments_home().parent / f"transformers-{lowest()}-{key}"
    if not place.exists():
        partial = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", partial], check=True, timeout=60)
            inner = sysconfig.get_path("purelib", "venv", {"base": str(partial), "platbase": str(partial)})
            # A bare path would not do, since editable installs in that environment are .pth files too.
            (Path(inner) / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
            pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(partial / "bin" / "python"), "install"]
            subprocess.run([*pip, f"transformers=={lowest()}"], check=True, timeout=INSTALL_DEADLINE)
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return place / "bin" / "python"


@pytest.mark.slow
def test_the_lowest_version_serves_publishes_and_trains(python: Path) -> None:
    told = subprocess.run(
        [python, "-c", "import transformers; print(transformers.__version__)"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert told.stdout.strip() == lowest()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [python, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *SLICE],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=RUN_DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
