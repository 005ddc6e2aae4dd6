"""One fleet for all ranks of a trainer: rank 0 owns it and publishes, the other ranks follow it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from millrace.errors import LaunchError
from millrace.sync import Fleet, Follower, follow_fleet
from millrace.train.ranks import own_address


@contextmanager
def fleet_of_ranks(start: Callable[[], AbstractContextManager[Fleet]]) -> Iterator[Fleet | Follower]:
    """Open a fleet on rank 0, which the other ranks of `accelerate launch` or torchrun follow.

    Every rank sends its own requests. The ranks leave the block together. With one rank this is `start()`.

    Args:
        start: Opens the fleet. It is called on rank 0 only.

    Raises:
        LaunchError: On the other ranks, if rank 0 could not open the fleet. Rank 0 raises the error itself.

    Example:

        with fleet_of_ranks(lambda: open_fleet({"kind": "vllm"}, MODEL, log_dir="logs")) as fleet:
            use_fleet(trainer, fleet)
            trainer.train()
    """
    ranks = PartialState()
    if not ranks.is_main_process:
        [url, key] = broadcast_object_list([None, None])
        if key is None:
            raise LaunchError(f"rank 0 could not open the fleet: {url}")
        with follow_fleet(url, key) as follower:
            yield follower
            ranks.wait_for_everyone()
        return
    with ExitStack() as stack:
        try:
            fleet = stack.enter_context(start())
            shared = stack.enter_context(fleet.share(own_address()))
        except BaseException as error:
            broadcast_object_list([str(error), None])
            raise
        broadcast_object_list([shared.url, shared.key])
        yield fleet
        ranks.wait_for_everyone()
