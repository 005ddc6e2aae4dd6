"""The methods that a trainer calls through POST /collective_rpc.

They take strings and return dictionaries, `{"error": "..."}` after a failure. Only JSON travels; nothing is unpickled.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from millrace_words import first_line

from .errors import RpcError
from .messages import parse_object
from .rank import Rank

PROTOCOL = 3

log = logging.getLogger("vllm.millrace")


def returns_errors(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Make a method return its exceptions as `{"error": ...}`.

    A single rank must not raise. vLLM would stop reading the answers at that rank, and the next call would get the
    answers that are left in the queues of the other ranks."""

    @functools.wraps(method)
    def answer(self: "Extension", *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            result = method(self, *args, **kwargs)
        except RpcError as error:
            log.error("%s: %s", method.__name__, error)
            result = {"error": str(error)}
        except Exception as error:  # the boundary: see above
            log.exception("%s failed", method.__name__)
            result = {"error": f"{type(error).__name__}: {first_line(error)} (the server's log has the trace)"}
        return result

    return answer


class Extension:
    """Mixed into vLLM's worker class. vLLM runs each call in every rank."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    rank: int

    @returns_errors
    def millrace_state(self) -> dict[str, Any]:
        """The state of this rank.

        `rank` counts through all data-parallel replicas; `world_size` is the number of ranks in this replica.
        `version` is None before the first commit, and while modules contain weights of an abandoned update. `planned`
        is the number of buckets whose layout had to be planned; all others replayed a plan."""
        this = self._millrace()
        return {
            "version": this.weights.version,
            "updating": this.weights.update is not None,
            "rank": this.rank,
            "world_size": self.vllm_config.parallel_config.world_size,
            "protocol": PROTOCOL,
            "planned": this.planned,
        }

    @returns_errors
    def millrace_begin(self) -> dict[str, Any]:
        self._millrace().begin()
        return {}

    @returns_errors
    def millrace_load(self, bucket: str, tensors: str = "[]") -> dict[str, Any]:
        """Load one bucket, and begin an update first if the bucket's `begin` is true.

        bucket: a JSON object with `kind` and the place of the bucket. Of kind process_group, `group` is the name of the
        group, `number` the number under which rank 0 announces the bucket, and `seconds` the time in which it must
        come. Of kind disk, `path` is a folder, `digest` identifies its weights, and `changes`, if there is one, has the
        `path` of the file of what has changed, and the digest of the version that it has changed from as `base`. A rank
        that holds that version writes only the changes where it can (see `folders`).

        tensors: what the bucket contains, a JSON list of [name, dtype, shape, offset, nbytes].

        `samples`: the sampled checksum of each tensor in turn, 32 hex digits. It is of the tensor in the model, if the
        model contains it unchanged, or else of the one that arrived. `names`: the tensors of a folder. `whole`: what of
        it was read whole although there were changes, and why; empty if there is nothing. `ignored`: the
        first of the tensors that this rank does not use, and how many others there are. Those are of another rank, or
        the model leaves them out."""
        return self._millrace().load(parse_object(bucket), tensors)

    @returns_errors
    def millrace_needs(self, tensors: str) -> dict[str, Any]:
        """Say which parts of an update's tensors this rank needs, and load nothing. After this, `millrace_load_parts`
        can bring parts of these tensors.

        tensors: all tensors of an update, a JSON list of [name, dtype, shape, offset, nbytes].

        `boxes`: for each tensor in turn, the boxes that this rank needs, which do not overlap. A box is the start and
        the end along each dimension. `unplanned`: why this can't be said, if it can't."""
        return self._millrace().needs(tensors)

    @returns_errors
    def millrace_load_parts(self, bucket: str, *parts: str) -> dict[str, Any]:
        """Load one bucket of parts, of its own in each rank. `begin` and `samples` are those of `millrace_load`.

        bucket: `ranks` has the place of each rank's bucket. parts: for each rank, what its bucket contains, a JSON list
        of [name, dtype, box, offset]. The rank reads no other text."""
        return self._millrace().load_parts(parse_object(bucket), parts)

    @returns_errors
    def millrace_audit(self, samples: str) -> dict[str, Any]:
        """What the layers hold, compared with samples of the trainer's weights. `millrace_audit` describes both."""
        return self._millrace().audit(samples)

    @returns_errors
    def millrace_commit(self, version: str) -> dict[str, Any]:
        self._millrace().weights.commit(version)
        self.model_runner.reset_encoder_cache()  # image embeddings that the old weights made
        self.model_runner.reset_mm_cache()
        return {"version": version}

    @returns_errors
    def millrace_abandon(self) -> dict[str, Any]:
        """Give the open update up. `torn`: modules contain weights of an abandoned update, and the next update must
        send all of these modules."""
        return {"torn": self._millrace().weights.abandon()}

    @returns_errors
    def millrace_join(self, group: str) -> dict[str, Any]:
        """Become a member of a process group, which ends the membership of another one. The rank then receives the
        buckets that rank 0 broadcasts there, each ahead of the call that loads it.

        group: a JSON object with name, backend (gloo or nccl), address, port, world_size, rank_offset and seconds.
        `rank_offset`: the number of this server's first rank. `seconds`: in which the ranks must meet with the first
        bucket, and each bucket must arrive."""
        self._millrace().join(parse_object(group))
        return {}

    @returns_errors
    def millrace_leave(self, name: str) -> dict[str, Any]:
        self._millrace().leave(name)
        return {}

    @returns_errors
    def millrace_checksums(self) -> dict[str, Any]:
        """The checksums of this rank's tensors in memory, under the model's names."""
        return {"checksums": self._millrace().stored.checksums()}

    @returns_errors
    def millrace_slots(self) -> dict[str, Any]:
        """vLLM's number of the LoRA adapter in each slot, or None."""
        return {"slots": list(self.model_runner.lora_manager._adapter_manager.lora_index_to_id)}

    @returns_errors
    def millrace_forget(self, lora: str) -> dict[str, Any]:
        """Remove a LoRA adapter from this rank. vLLM's own unloading removes only its name."""
        self.model_runner.lora_manager.remove_adapter(int(lora))
        return {}

    def _millrace(self) -> Rank:
        if "_millrace_rank" not in vars(self):  # vLLM does not call the constructor of an extension
            self._millrace_rank = Rank(self.model_runner.get_model(), self.vllm_config, self.device, self.rank)
        return self._millrace_rank
