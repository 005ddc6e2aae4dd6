"""Weights that are sharded over a trainer's ranks.

If the engines can say which parts they need, the ranks exchange these (`weights/shards`). Otherwise a tensor is
gathered when it is needed, so no rank ever holds more than one whole tensor. Rank 0 publishes; the other ranks take
part:

    sharded = ShardedTensors(dict(model.named_parameters()))
    if dist.get_rank() == 0:
        with leading(sharded, fleet.dtypes) as tensors:
            fleet.publish(tensors, 7)
    else:
        follow(sharded)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from millrace.buckets import ProcessGroup
from millrace.errors import PublishError
from millrace.extension.millrace_words import first_line
from millrace.model_folder import FLOATS
from millrace.weights.cast import Dtypes
from millrace.weights.finite import not_finite
from millrace.weights.shards.exchange import Exchange, Filled, RankPlace, places
from millrace.weights.shards.members import join_all
from millrace.weights.shards.sending import Sending
from millrace.weights.shards.views import NotExchangeable
from millrace.weights.sidecar.messages import Form

# What rank 0 broadcasts in place of a tensor's index.
END, CHECK, PLACES, BEGIN, FILL, RELEASE, JOIN, SEND = -1, -2, -3, -4, -5, -6, -7, -8
CASTS: tuple[torch.dtype | None, ...] = (None, *(getattr(torch, name) for name in FLOATS.values()))  # sent by index
BUCKET_FORMS = tuple(Form)  # sent by index


@dataclass(frozen=True, slots=True)
class ShardedTensors:
    """A model's tensors by name, in the same order on all ranks.

    Each tensor is a DTensor in any placement (FSDP2, tensor parallel, or both), or a plain tensor that every rank has
    whole. Make a DTensor of any other shard by `DTensor.from_local(shard, mesh, [Shard(dim)])`.

    Iteration yields the whole tensors. It is collective: all ranks must iterate, to the end. It can be repeated.
    """

    tensors: Mapping[str, Tensor]

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the names and shapes of the whole tensors. Gathers nothing."""
        return [(name, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.tensors:
            yield name, self.whole(name)

    def whole(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole tensor on the device of its shards, cast to `dtype` if that is not None.

        Collective: all ranks must pass the same arguments. Does not copy a tensor that is neither sharded nor cast.
        """
        tensor = self.tensors[name].detach()
        if dtype is not None:
            tensor = tensor.to(dtype)  # before gathering, which then moves fewer bytes
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True, slots=True)
class LedTensors:
    """The whole tensors, for rank 0 to publish while the other ranks are in `follow`.

    Rank 0 may iterate over them as often and as far as it likes. If `dtypes` is set, matrices are cast before they are
    gathered. The publish casts the smaller tensors.
    """

    sharded: ShardedTensors
    dtypes: Dtypes | None = None

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return self.sharded.shapes()

    def not_finite(self, dtypes: Dtypes) -> list[str]:
        """Return the names of the tensors that have a NaN or an infinite value. All ranks check their own shards."""
        with _together("check the weights' values"):
            _broadcast(self.sharded, CHECK, CASTS.index(torch.float16 if dtypes.usual == "float16" else None))
            return _not_finite(self.sharded, Dtypes(dtypes.usual, {}))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        # Nothing is cast here if some tensors have an unusual dtype: these are known by the checkpoint's names, and the
        # names here are the trainer's.
        dtypes = self.dtypes if self.dtypes is not None and not self.dtypes.unusual else None
        for index, (name, tensor) in enumerate(self.sharded.tensors.items()):
            is_matrix = isinstance(tensor, DTensor) and tensor.ndim > 1
            dtype = dtypes.cast_to(name, tensor.dtype) if is_matrix and dtypes is not None else None
            with _together("gather the weights"):
                _broadcast(self.sharded, index, CASTS.index(dtype))
                whole = self.sharded.whole(name, dtype)
            yield name, whole


@contextmanager
def leading(sharded: ShardedTensors, dtypes: Dtypes | None = None) -> Iterator[LedTensors]:
    """Return the tensors to publish, on rank 0 of the default process group. Every other rank must call `follow`, which
    returns when this context ends.

    dtypes: the dtypes of the engines (`Fleet.dtypes`), to cast matrices to before they are gathered.
    """
    try:
        yield LedTensors(sharded, dtypes)
    except BaseException:
        with suppress(RuntimeError):  # if a rank has ended, the error on its way says it
            _broadcast(sharded, END)
        raise
    _broadcast(sharded, END)


def follow(sharded: ShardedTensors) -> None:
    """Take part in sending the tensors that rank 0 publishes, until its `leading` context ends. All ranks but 0 must
    call this.

    Like every collective, it raises if rank 0 does nothing for longer than the process group's timeout.
    """
    exchange: Exchange | Sending | None = None
    try:
        while (received := _broadcast(sharded, END))[0] != END:
            exchange = _do(sharded, *received, exchange)
    finally:
        if exchange is not None:
            exchange.close()


# What rank 0 does in an exchange. All other ranks do the same in `follow`.


def ask_places(led: LedTensors) -> list[RankPlace]:
    """Return what each rank has. Raises NotExchangeable if a rank's part of a tensor is no box."""
    with _together("exchange the weights"):
        _broadcast(led.sharded, PLACES)
        return places(led.sharded.tensors, _on_device(led.sharded))


def begin_exchange(led: LedTensors, schedule: bytes, form: Form) -> Exchange:
    """Begin an exchange on all ranks, and return rank 0's. End it by `end_exchange`.

    schedule: from `shards.schedule.written`. form: of the buckets' memory. Raises PublishError if a rank has no room
    for its buckets.
    """
    with _together("exchange the weights"):
        _broadcast(led.sharded, BEGIN, BUCKET_FORMS.index(form))
        return Exchange.begin(led.sharded.tensors, _on_device(led.sharded), form, schedule)


def fill_buckets(led: LedTensors, exchange: Exchange, number: int, shares: Sequence[int]) -> list[Filled]:
    """Fill the buckets of all ranks for one round, and return them.

    shares: how many ranks of engines will open the bucket of each rank.
    """
    with _together("exchange the weights"):
        _broadcast(led.sharded, FILL, number)
        return exchange.fill(number, shares)


def join_groups(led: LedTensors, groups: Sequence[ProcessGroup], seconds: float) -> Mapping[str, str]:
    """Have all ranks join these groups, each in at most so many seconds. Return why some did not form, by their
    names."""
    with _together("join the engines"):
        _broadcast(led.sharded, JOIN)
        return join_all(_on_device(led.sharded), groups, seconds)


def begin_sending(led: LedTensors, groups: Sequence[str], schedule: bytes) -> Sending:
    """Begin to send parts on all ranks, in the groups of these names, and return rank 0's part of it. End it by
    `end_exchange`. The arguments and errors are those of `Sending.begin`."""
    with _together("send the weights"):
        _broadcast(led.sharded, SEND)
        return Sending.begin(led.sharded.tensors, _on_device(led.sharded), groups, schedule)


def send_round(led: LedTensors, sending: Sending, number: int) -> list[str]:
    """Have all ranks send the parts of one round, and return the samples of each rank's (`Sending.fill`)."""
    with _together("send the weights"):
        _broadcast(led.sharded, FILL, number)
        return sending.fill(number)


def end_exchange(led: LedTensors, exchange: Exchange | Sending) -> None:
    """Free the memory of the exchange on all ranks. A rank that has ended needs no notice."""
    with suppress(RuntimeError):
        _broadcast(led.sharded, RELEASE)
    exchange.close()


@contextmanager
def _together(what: str) -> Iterator[None]:
    """Raise PublishError if the ranks' collectives in this block fail. what: to do."""
    try:
        yield
    except RuntimeError as error:  # torch's
        raise PublishError(
            f"the trainer's ranks could not {what}: {first_line(error)}; if a rank has ended, start the trainer again"
        ) from error


def _do(
    sharded: ShardedTensors, what: int, value: int, exchange: Exchange | Sending | None
) -> Exchange | Sending | None:
    """Do on this rank what rank 0 has broadcast. Return the exchange that is open after it."""
    if what >= 0:
        sharded.whole(list(sharded.tensors)[what], CASTS[value])
    elif what == CHECK:
        dtype = CASTS[value]
        _not_finite(sharded, Dtypes(None if dtype is None else str(dtype).removeprefix("torch."), {}))
    elif what == PLACES:
        with suppress(NotExchangeable):  # rank 0 says it
            places(sharded.tensors, _on_device(sharded))
    elif what == BEGIN:
        with suppress(PublishError):  # rank 0 raises it
            return Exchange.begin(sharded.tensors, _on_device(sharded), BUCKET_FORMS[value])
    elif what == JOIN:
        join_all(_on_device(sharded))
    elif what == SEND:
        with suppress(PublishError):  # rank 0 raises it
            return Sending.begin(sharded.tensors, _on_device(sharded))
    elif what == FILL:
        assert exchange is not None
        exchange.fill(value)
    elif exchange is not None:  # RELEASE
        exchange.close()
        return None
    return exchange


def _not_finite(sharded: ShardedTensors, dtypes: Dtypes) -> list[str]:
    """Return the names of the tensors that have a NaN or an infinite value after the cast to `dtypes`.

    Collective. Each rank checks its own shards, and nothing is gathered."""
    shards = [(name, t.to_local() if isinstance(t, DTensor) else t) for name, t in sharded.tensors.items()]
    bad = frozenset(not_finite(shards, dtypes))
    found = torch.tensor([name in bad for name in sharded.tensors], dtype=torch.uint8, device=_on_device(sharded))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [name for name, is_bad in zip(sharded.tensors, found.tolist(), strict=True) if is_bad]


def _broadcast(sharded: ShardedTensors, what: int, value: int = 0) -> tuple[int, int]:
    """Return rank 0's arguments, on every rank."""
    message = torch.tensor((what, value), device=_on_device(sharded))
    dist.broadcast(message, src=0)
    what, value = message.tolist()
    return what, value


def _on_device(sharded: ShardedTensors) -> torch.device:
    """Return the tensors' device, and make it current in this thread. A publish runs in several threads, and each has
    its own current device."""
    device = next(iter(sharded.tensors.values())).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
