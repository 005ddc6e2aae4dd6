"""The number of CPU threads that the trainer uses."""

import os

from millrace.config.models import RunConfig


def trainer_threads(config: RunConfig) -> int | None:
    """Return the number of threads for this process; None leaves torch's own, which is that of OMP_NUM_THREADS.

    torchrun sets this variable to 1 if it starts several processes.
    """
    if config.train.threads != "auto":
        return config.train.threads
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) - busy_threads(config))


def busy_threads(config: RunConfig) -> int:
    """Return the threads of the engines that run on this host's CPU during training.

    An engine without a number counts as one.
    """
    engine = config.engine
    if config.mode == "hybrid" or engine.device != "cpu" or engine.urls is not None:
        return 0
    return engine.most_replicas * (engine.threads or 1)
