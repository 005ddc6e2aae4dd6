"""Write the payload of SGLang's /update_weights_from_tensor: a pickle, without pickling anything.

SGLang takes tensors as a base64 pickle of {"flattened_tensor", "metadata"} with load_format `flattened_bucket`. The
metadata are objects of an SGLang class. Millrace does not import SGLang. It writes only the opcodes that the server's
allow-list accepts.
"""

import base64
from collections.abc import Sequence

from millrace.buckets import CudaIpcBucket, CudaIpcShare, RankBucket, SharedMemoryBucket, TensorSpec, TorchStorageBucket
from millrace.engines.opcodes import PROTOCOL, STOP, Call, Name, encode
from millrace.engines.stock.state import InvalidStateError

REDUCTIONS = "torch.multiprocessing.reductions"
BUCKET_MODULE = b"sglang.srt.weight_sync.tensor_bucket"
# SGLang's variant of torch's rebuild function. It finds the GPU by its UUID.
REBUILD_CUDA = ("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified")


def payloads(bucket: CudaIpcBucket | TorchStorageBucket, ranks: int) -> list[str]:
    """Return the payload of each rank, in base64."""
    metadata = b"](" + b"".join(map(_metadata, bucket.tensors)) + b"e"
    return [
        base64.b64encode(
            PROTOCOL + b"}(" + encode("flattened_tensor") + encode(tensor) + encode("metadata") + metadata + b"u" + STOP
        ).decode()
        for tensor in _tensors(bucket, ranks)
    ]


def loader_payloads(bucket: CudaIpcBucket | TorchStorageBucket, orders: Sequence[str]) -> list[str]:
    """Return the payload of each rank for Millrace's weight loader, in base64: [(its order, the bucket's bytes)]."""
    return [_order(*pair) for pair in zip(orders, _tensors(bucket, len(orders)), strict=True)]


def order_payloads(orders: Sequence[str]) -> list[str]:
    """Return the payload of each rank for an order without a bucket in memory: [(its order, an empty tensor)]."""
    return [_order(order, Call(Name("torch", "ByteTensor"), ())) for order in orders]


def _order(order: str, tensor: Call) -> str:
    """Return the payload of one rank, in base64."""
    return base64.b64encode(PROTOCOL + b"](" + encode((order, tensor)) + b"e" + STOP).decode()


def parts_payloads(ranks: Sequence[RankBucket], orders: Sequence[str]) -> list[str]:
    """Return the payload of each rank for Millrace's weight loader, in base64: [(its order, its bucket's bytes)].

    Raises InvalidStateError for memory that SGLang can't open.
    """
    payloads = []
    for rank, order in zip(ranks, orders, strict=True):
        if isinstance(rank.memory, SharedMemoryBucket):
            raise InvalidStateError("it can't open a memory file; send the parts by torch storage")
        payloads += loader_payloads(rank.memory, [order])
    return payloads


def _tensors(bucket: CudaIpcBucket | TorchStorageBucket, ranks: int) -> list[Call]:
    """Return the call that makes the tensor of the bucket's bytes, for each rank."""
    match bucket:
        case CudaIpcBucket(shares=shares, nbytes=nbytes):
            if len(shares) != ranks:
                raise ValueError(f"{len(shares)} shares for {ranks} ranks")
            return [_cuda_tensor(share, nbytes) for share in shares]
        case TorchStorageBucket():
            return [_cpu_tensor(bucket)] * ranks


def _metadata(spec: TensorSpec) -> bytes:
    """Return opcodes that make SGLang's FlattenedTensorMetadata without calling its constructor.

    They are written flat rather than nested, for speed: a model has hundreds of them, and the server waits meanwhile.
    """
    return b"".join(
        (
            b"c" + BUCKET_MODULE + b"\nFlattenedTensorMetadata\n)\x81}(",
            encode("name"),
            encode(spec.name),
            encode("shape"),
            b"ctorch\nSize\n(",
            encode(spec.shape),
            b"tR",
            encode("dtype"),
            b"ctorch\n" + spec.dtype.encode() + b"\n",
            encode("start_idx"),
            encode(spec.offset),
            encode("end_idx"),
            encode(spec.offset + spec.nbytes),
            encode("numel"),
            encode(spec.nbytes),
            b"ub",
        )
    )


def _cuda_tensor(share: CudaIpcShare, nbytes: int) -> Call:
    """Return the call of torch's rebuild_cuda_tensor that makes a flat tensor of bytes over its own storage."""
    return Call(
        Name(*REBUILD_CUDA),
        (
            Name("torch", "Tensor"),
            Call(Name("torch", "Size"), ((nbytes,),)),
            (1,),
            0,
            Name("torch.storage", "UntypedStorage"),
            Name("torch", "uint8"),
            share.device,
            share.handle,
            share.storage_bytes,
            share.storage_offset,
            False,
            share.ref_counter_handle,
            share.ref_counter_offset,
            share.event_handle,
            share.event_sync_required,
        ),
    )


def _cpu_tensor(bucket: TorchStorageBucket) -> Call:
    storage = Call(
        Name(REDUCTIONS, "rebuild_storage_filename"),
        # The trainer's manager process counts the users. The server's own manager would remove the memory while the
        # trainer uses it, if the server died.
        (Name("torch.storage", "UntypedStorage"), bucket.manager, bucket.handle, bucket.nbytes),
    )
    typed = Call(Name(REDUCTIONS, "rebuild_typed_storage"), (storage, Name("torch", "uint8")))
    # The arguments of rebuild_tensor: offset, size, stride, requires_grad.
    layout = (0, Call(Name("torch", "Size"), ((bucket.nbytes,),)), (1,), False)
    return Call(Name(REDUCTIONS, "rebuild_tensor"), (Name("torch", "Tensor"), typed, layout))
