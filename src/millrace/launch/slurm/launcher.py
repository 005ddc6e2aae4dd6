"""The launcher in a Slurm job, in the fleet's process. Its driver is `driver.py`."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from millrace.errors import ConfigError
from millrace.launch.driven import JOIN_DEADLINE, DrivenLauncher, open_driver
from millrace.launch.slurm.job import read_job

NOT_JOINED = f"the launcher of Slurm did not start within {JOIN_DEADLINE:.0f} s{{}}"


@asynccontextmanager
async def open_slurm(cluster: str | None) -> AsyncIterator[DrivenLauncher]:
    """Yield the launcher in the Slurm job whose id is `cluster`, or in the job that this process runs in.

    An engine's nodes are packed, and engines are spread over the job's nodes. Raises ConfigError if Slurm's commands
    are not here or no job is named, and LaunchError if the job does not run.
    """
    missing = [program for program in ("srun", "scontrol", "scancel") if shutil.which(program) is None]
    if missing:
        raise ConfigError(f"engine.launch: slurm needs Slurm's commands, and {missing[0]} is not in PATH")
    number = cluster or os.environ.get("SLURM_JOB_ID")
    if not number:
        raise ConfigError(
            "engine.launch: slurm needs a job: run this in one (sbatch, salloc), or set engine.cluster to the id of a "
            "running job"
        )
    if not number.isdecimal():
        raise ConfigError(f"engine.cluster: {number!r} is not the id of a Slurm job, such as 4711")
    job = await read_job(str(int(number)))
    async with open_driver("millrace.launch.slurm.driver", [str(job.number)], NOT_JOINED) as launcher:
        yield launcher
