"""A group of NCCL alone, for receivers that have no group of torch.distributed around theirs: vLLM's own transfer
engine."""

import threading

import torch
import torch.distributed as dist

from millrace.engines.vllm.payload import UNIQUE_ID_KEY, unique_id
from millrace.weights.transports.process_group import SendingGroup

OWN_KEY = "0"  # where torch puts the id of its first group of NCCL


class BareNcclGroup(SendingGroup):
    """Receivers find the group's id in the store, enter it, and sum one element over all ranks before anything else."""

    def join(self) -> None:
        """Blocks until all are there."""
        ids = dist.HashStore()
        self._group = self._nccl(ids)
        failed: list[RuntimeError] = []

        def hand_on() -> None:
            try:
                ids.wait([OWN_KEY], self._deadline)
                self._store.set(UNIQUE_ID_KEY, unique_id(bytes(ids.get(OWN_KEY))))
            except RuntimeError as error:
                failed.append(error)

        handing = threading.Thread(target=hand_on, daemon=True)
        handing.start()
        self._group.allreduce([torch.zeros(1, device="cuda")]).wait()
        handing.join()
        torch.cuda.current_stream().synchronize()
        if failed:
            raise failed[0]
