"""One Slurm for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import millrace
from tests.launch.slurm.cluster import SlurmCluster, slurm_cluster


@pytest.fixture(scope="package")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), Path(millrace.__file__).parent) as cluster:
        yield cluster
