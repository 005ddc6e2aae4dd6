"""One Slurm for all tests of this folder."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import millrace
from tests.launch.slurm.cluster import SlurmCluster, slurm_cluster


@pytest.fixture(scope="package")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), copies_of_millrace()) as cluster:
        yield cluster


def copies_of_millrace() -> Sequence[Path]:
    """Return the folders where a step of this process finds Millrace: by PYTHONPATH, and as it is installed."""
    # The installed one may be missing.
    find = "from importlib.util import find_spec; print(*find_spec('millrace').submodule_search_locations)"
    installed = subprocess.run(
        [sys.executable, "-I", "-c", find], capture_output=True, text=True, timeout=60
    )  # or none
    return sorted({Path(millrace.__file__).parent, *map(Path, installed.stdout.split())})
