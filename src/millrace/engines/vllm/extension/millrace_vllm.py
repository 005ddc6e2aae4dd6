"""What vLLM's workers load by `--worker-extension-cls millrace_vllm.Extension`: new weights for a running engine.

Its methods are called through POST /collective_rpc, take strings and return dictionaries, `{"error": "..."}` where
something is wrong. JSON is all that travels; nothing is unpickled. The file stands alone: its folder goes on the
server's PYTHONPATH, and it imports nothing of Millrace. It works on vLLM 0.23.0 and 0.32.0.

A trainer's names differ from vLLM's: q_proj, k_proj and v_proj become one qkv_proj, 128 experts one tensor. Where each
tensor goes is learned by letting the model's own `load_weights` run over a twin of the model, which has shapes and no
memory (`Plan`). So a tensor that the model does not know, or of another shape, is an error before anything is written,
and a module of which parts have come is not taken for whole.

A module that uses its tensors as they were loaded is written in place. One that vLLM works on after loading (packed by
oneDNN on the CPU, experts, quantised) waits until all of its parts are there, and then goes through vLLM's layer-wise
reload by itself: between two calls every module has its memory, whatever failed.
"""

import base64
import functools
import json
import logging
import math
import mmap
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm.distributed import get_pp_group, get_tp_group
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

PROTOCOL = 1
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # the model's own is made of any of these
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
SUM_LANES = 1 << 22  # lanes of 8 bytes that are summed at a time: 32 MiB
PROBE_ROWS = 256
SAMPLE_BLOCKS, SAMPLE_WIDTH = 128, 64
SAMPLE = SAMPLE_BLOCKS * SAMPLE_WIDTH  # elements of a tensor
SAMPLED_TOGETHER = 256  # tensors
# Torch's watchdog would end this process when the trainer dies.
NCCL_SETTINGS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}

log = logging.getLogger("vllm.millrace")

T = TypeVar("T")
Region = tuple[str, int, tuple[int, ...], tuple[int, ...]]  # in a module: the tensor's name, offset, sizes, strides
Owners = dict[int, tuple[str, str, torch.Tensor]]  # by storage: a module, the name in it, the tensor
Part = tuple[str, torch.Tensor, torch.dtype]  # of a module: the sent name, what was sent, what the model makes of it


class Refused(Exception):
    """The call, or what it sent, can't be used; the message says why."""


def answered(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Makes an answer of what a method raises. A rank never raises by itself: the answers of the ranks after it would
    stay in vLLM's queues, and the next call would take them for its own."""

    @functools.wraps(method)
    def answer(self: "Extension", *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            result = method(self, *args, **kwargs)
        except Refused as refused:
            log.error("%s: %s", method.__name__, refused)
            result = {"error": str(refused)}
        except Exception as error:  # the boundary: see above
            log.exception("%s failed", method.__name__)
            result = {"error": f"{type(error).__name__}: {first_line(error)} (the server's log has the trace)"}
        tell_of_replica(result, self.rank, self.vllm_config.parallel_config)
        return result

    return answer


def tell_of_replica(result: dict[str, Any], rank: int, parallel: Any) -> None:
    """With data parallelism, vLLM passes on the answers of the first replica alone, and what any of them throws. So in
    the others the last rank throws, whichever has failed: the answers of those before it have been read by then."""
    if parallel.data_parallel_index == 0:
        return
    failed = torch.tensor(int("error" in result), device="cpu")
    for group in (get_tp_group(), get_pp_group()):
        if group.world_size > 1:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=group.cpu_group)
    if failed and rank == parallel.world_size - 1:
        detail = result.get("error", "another rank of it failed; the server's log says why")
        raise RuntimeError(f"replica {parallel.data_parallel_index}: {detail}")


class Extension:
    """Mixed into vLLM's worker class; each call reaches every rank, and this is one of them."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    rank: int

    @answered
    def millrace_state(self) -> dict[str, Any]:
        """`rank` counts through all replicas (DP), `world_size` the ranks of this one. `version` is None until the
        first commit, and while modules hold weights of an update that was given up."""
        this = self._millrace()
        return {
            "version": this.weights.version,
            "updating": this.weights.update is not None,
            "rank": this.rank,
            "world_size": self.vllm_config.parallel_config.world_size,
            "protocol": PROTOCOL,
        }

    @answered
    def millrace_begin(self) -> dict[str, Any]:
        self._millrace().weights.begin()
        return {}

    @answered
    def millrace_load(self, bucket: str) -> dict[str, Any]:
        """`ignored` are the names that this rank has no place for: another rank's, or what the model leaves out."""
        return {"ignored": self._millrace().load(parsed(bucket))}

    @answered
    def millrace_commit(self, version: str) -> dict[str, Any]:
        self._millrace().weights.commit(version)
        self.model_runner.reset_encoder_cache()  # what the old weights made of images
        self.model_runner.reset_mm_cache()
        return {"version": version}

    @answered
    def millrace_abandon(self) -> dict[str, Any]:
        """`torn`: modules hold weights of an update that was given up. The next commit must have brought these anew."""
        return {"torn": self._millrace().weights.abandon()}

    @answered
    def millrace_join(self, group: str) -> dict[str, Any]:
        self._millrace().join(parsed(group))
        return {}

    @answered
    def millrace_leave(self, name: str) -> dict[str, Any]:
        self._millrace().leave(name)
        return {}

    @answered
    def millrace_checksums(self) -> dict[str, Any]:
        """Of this rank's tensors as they stand in memory: see `Weights.checksums`."""
        return {"checksums": self._millrace().weights.checksums()}

    @answered
    def millrace_samples(self) -> dict[str, Any]:
        """Of the tensors of the open update, under the names by which they were sent: see `Weights.samples`."""
        return {"samples": self._millrace().weights.samples()}

    @answered
    def millrace_slots(self) -> dict[str, Any]:
        """Which LoRA adapter, by vLLM's number for it, is in each of the places for them."""
        return {"slots": list(self.model_runner.lora_manager._adapter_manager.lora_index_to_id)}

    @answered
    def millrace_forget(self, lora: str) -> dict[str, Any]:
        """vLLM's own unloading takes away the name alone."""
        self.model_runner.lora_manager.remove_adapter(int(lora))
        return {}

    def _millrace(self) -> "Rank":
        if "_millrace_rank" not in vars(self):  # vLLM never calls a constructor of ours
            self._millrace_rank = Rank(self.model_runner.get_model(), self.vllm_config, self.device, self.rank)
        return self._millrace_rank


class Rank:
    """One worker: its weights, the groups that it has joined, and the ways by which buckets reach it."""

    def __init__(self, model: torch.nn.Module, config: Any, device: torch.device, rank: int) -> None:
        parallel = config.parallel_config
        self.rank = parallel.data_parallel_index * parallel.world_size + rank
        self.weights = Weights(model, config, device)
        self._device = device
        self._groups: dict[str, Group] = {}

    def join(self, wanted: dict[str, Any]) -> None:
        name = take(wanted, "name", str)
        if name in self._groups:
            raise Refused(f"group {name} is joined already; leave it first")
        self._groups[name] = Group(wanted, self.rank)

    def leave(self, name: str) -> None:
        if name not in self._groups:
            raise Refused(f"no group {name} has been joined")
        self._groups.pop(name).close()

    def load(self, bucket: dict[str, Any]) -> list[str]:
        kind = take(bucket, "kind", str)
        if kind == "disk":
            return self._load_folder(Path(take(bucket, "path", str)))
        if kind not in ("shared_memory", "cuda_ipc", "process_group"):
            raise Refused(f"buckets of kind {kind} are not known here")
        specs = [spec_of(tensor) for tensor in take(bucket, "tensors", list)]
        if kind == "shared_memory":
            path = take(bucket, "path", str)
            return self.weights.load(specs, lambda: views(mapped(path), specs))
        if kind == "cuda_ipc":
            shares, nbytes = take(bucket, "shares", list), take(bucket, "nbytes", int)
            if self.rank >= len(shares) or not isinstance(shares[self.rank], dict):
                raise Refused(f"{len(shares)} shares, and none for rank {self.rank}")
            return self.weights.load(specs, lambda: views(opened(shares[self.rank], nbytes, self._device), specs))
        name = take(bucket, "group", str)
        if name not in self._groups:
            raise Refused(f"no group {name} has been joined; join it first")
        return self.weights.load(specs, lambda: self._groups[name].receive(specs, self._device))

    def _load_folder(self, folder: Path) -> list[str]:
        """What the index names, where there is one: other files are no part of the model."""
        tensors: dict[str, torch.Tensor] = {}
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        try:
            places = json.loads(index.read_text())["weight_map"] if index.is_file() else None
            names = set(places.values()) if places else [single.name] if single.is_file() else None
            files = sorted(folder.glob("*.safetensors")) if names is None else [folder / name for name in sorted(names)]
            for file in files:
                with safe_open(file, framework="pt") as content:
                    for name in content.keys():  # noqa: SIM118  # it is no mapping
                        if places is not None and places.get(name) != file.name:
                            continue
                        if name in tensors:
                            raise Refused(f"{name} is in two files of {folder}")
                        tensors[name] = content.get_tensor(name)  # mapped, not read
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise Refused(f"could not read {folder}: {first_line(error)}") from error
        if not tensors:
            raise Refused(f"{folder} has no safetensors files on this host")
        specs = [Spec(name, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes) for name, tensor in tensors.items()]
        return self.weights.load(specs, lambda: list(tensors.values()))


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor that was announced, and where it lies in its bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Target:
    """What a sent tensor fills in this rank: `regions` of `module`, with the elements of each; without a module,
    nothing. `shared` names the parameter where several modules hold it, as lm_head and embed_tokens may."""

    module: str | None
    dtype: torch.dtype
    regions: dict[Region, int] = field(default_factory=dict)
    shared: str | None = None


@dataclass(slots=True)
class Update:
    """What has come since `begin`. filled: the elements, by module and region. held: parts of modules that wait for the
    others. shared: for a parameter that may come under several names, the digest that came under each. samples: of
    tensors as they came, which do not stand in the model as they are."""

    sent: set[str] = field(default_factory=set)
    standing: dict[str, torch.Tensor] = field(default_factory=dict)  # in the model, as they were sent
    samples: dict[str, str] = field(default_factory=dict)
    filled: dict[str, dict[Region, int]] = field(default_factory=dict)
    held: dict[str, list[Part]] = field(default_factory=dict)
    overwritten: set[str] = field(default_factory=set)
    shared: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    failed: bool = False  # half-way through a load: what is where, nobody knows

    def count(self, module: str, name: str) -> int:
        """How many elements of a module's tensor have come."""
        return sum(elements for region, elements in self.filled.get(module, {}).items() if region[0] == name)


class Weights:
    """A rank's model, the update that is open, and what an update that was given up has left behind."""

    def __init__(self, model: torch.nn.Module, config: Any, device: torch.device) -> None:
        self._model, self._config, self._device = model, config, device
        parallel = config.parallel_config
        self._plan = Plan(model, config.model_config.dtype, parallel.tensor_parallel_size * parallel.data_parallel_size)
        # Attention: vLLM finishes it after all others, since it takes from them (MLA).
        modules = self._plan.modules.items()
        self._finished_last = [path for path, module in modules if hasattr(module, "process_weights_after_loading")]
        self._kept = [
            (path, name)
            for path, module in modules
            for name, tensor in {**module._parameters, **module._buffers}.items()
            if tensor is not None and name not in module._non_persistent_buffers_set
        ]
        self.update: Update | None = None
        self.version: str | None = None
        self.stale: set[str] = set()  # modules that hold weights of an update that was given up

    def begin(self) -> None:
        if self.update is not None:
            raise Refused("an update is open already; commit or abandon it first")
        self.update = Update()

    def load(self, specs: list[Spec], fetch: Callable[[], list[torch.Tensor]]) -> list[str]:
        """Loads what `fetch` returns for `specs`, whose memory is only lent. Returns the names that have no place."""
        update = self._opened()
        targets = self._plan.targets(specs)
        counts = Counter([*update.sent, *(spec.name for spec in specs)])
        if twice := {name for name, count in counts.items() if count > 1}:
            raise Refused(f"sent twice in one update: {shown(twice)}")
        tensors = fetch()
        update.failed = True
        update.sent.update(spec.name for spec in specs)
        in_place: list[Part] = []
        waiting: dict[str, list[Part]] = {}
        for spec, target, tensor in zip(specs, targets, tensors, strict=True):
            if target.shared is not None:
                update.shared.setdefault(target.shared, {})[spec.name] = digest(tensor).cpu()
            if target.module is not None:
                update.filled.setdefault(target.module, {}).update(target.regions)
                direct = self._is_direct(target.module)
                parts = in_place if direct else waiting.setdefault(target.module, [])
                parts.append((spec.name, tensor, target.dtype))
                if direct:
                    update.overwritten.add(target.module)
        self._note(update, specs, targets, tensors)
        whole = {module for module in waiting if self._is_whole(module) and module not in self._finished_last}
        for module in waiting.keys() - whole:
            copies = ((name, tensor.to(dtype, copy=True), dtype) for name, tensor, dtype in waiting[module])
            update.held.setdefault(module, []).extend(copies)
        complete = (part for module in whole for part in update.held.pop(module, []) + waiting[module])
        self._write(whole, [*in_place, *complete])
        update.failed = False
        return [
            spec.name for spec, target in zip(specs, targets, strict=True) if target.module is None is target.shared
        ]

    def commit(self, version: str) -> None:
        update = self._opened()
        if not update.sent:
            raise Refused("nothing was loaded; load the weights, or abandon the update")
        self._check_complete(update)
        update.failed = True
        self._write(set(self._finished_last), [part for parts in update.held.values() for part in parts])
        self.update, self.version = None, version
        self.stale.clear()

    def abandon(self) -> bool:
        """Returns whether modules hold weights of an update that was given up, of this one or one before."""
        if self.update is not None:
            self.stale |= self.update.overwritten
            self.update = None
        if self.stale:
            self.version = None
        return bool(self.stale)

    def checksums(self) -> dict[str, str]:
        """The digest of every parameter and persistent buffer as it stands in memory, by its name.

        What oneDNN has packed can't be read; it is asked for by multiplication (`unpacked`), so that a layer's digest
        is the same as on a GPU. Experts that vLLM packs on the CPU are digested as they are packed."""
        digests = {}
        for path, name in self._kept:
            module = self._plan.modules[path]
            tensor = module._parameters.get(name, module._buffers.get(name))
            table = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
            if name == "weight" and "cpu_linear" in vars(module) and not table:
                tensor = unpacked(module)
            if tensor is not None and tensor.numel():
                digests[f"{path}.{name}"] = digest(tensor)
        sums = torch.stack(list(digests.values())).cpu().tolist()  # one transfer for all
        return {
            name: "".join(f"{n & (2**64 - 1):016x}" for n in pair) for name, pair in zip(digests, sums, strict=True)
        }

    def samples(self) -> dict[str, str]:
        """A checksum of a part of each tensor that came: as it stands in the model, where it stands there as it was
        sent, otherwise as it came."""
        update = self._opened()
        return update.samples | dict(zip(update.standing, sampled(list(update.standing.values())), strict=True))

    def _note(self, update: Update, specs: list[Spec], targets: list[Target], tensors: list[torch.Tensor]) -> None:
        """What `samples` will read."""
        standing = [self._standing(spec, target) for spec, target in zip(specs, targets, strict=True)]
        update.standing |= {s.name: tensor for s, tensor in zip(specs, standing, strict=True) if tensor is not None}
        others = [index for index, tensor in enumerate(standing) if tensor is None]
        sums = sampled([tensors[index].contiguous() for index in others])
        update.samples |= {specs[index].name: value for index, value in zip(others, sums, strict=True)}

    def _standing(self, spec: Spec, target: Target) -> torch.Tensor | None:
        """The tensor in the model that has what was sent, as it was sent."""
        regions = [region for region in target.regions if region[2] == spec.shape]
        if target.module is None or not self._is_direct(target.module) or len(regions) != 1:
            return None
        [(name, offset, sizes, strides)] = regions
        module = self._plan.modules[target.module]
        tensor = module._parameters.get(name, module._buffers.get(name))
        if tensor is None or tensor.dtype is not spec.dtype:
            return None
        held = tensor.detach().as_strided(sizes, strides, tensor.storage_offset() + offset)
        return held if held.is_contiguous() else None

    def _opened(self) -> Update:
        if self.update is None:
            raise Refused("no update is open; begin one first")
        if self.update.failed:
            raise Refused("a load of this update failed half-way; abandon it")
        return self.update

    def _write(self, whole: set[str], parts: list[Part]) -> None:
        """Loads the modules of `whole` through vLLM's reload, and what else is in `parts` in place."""
        assert self.update is not None
        self.update.overwritten |= whole & self.update.filled.keys()
        modules = [self._plan.modules[path] for path in whole]
        chosen = Only(modules)
        try:
            with set_current_vllm_config(self._config), torch.no_grad(), self._packing_anew(modules):
                initialize_layerwise_reload(chosen)
                try:
                    if parts:
                        weights = ((name, tensor.to(dtype)) for name, tensor, dtype in parts)
                        with without_loras(self._model):
                            self._model.load_weights(weights)  # type: ignore[operator]
                except BaseException:
                    for info in map(get_layerwise_info, modules):  # they get their old memory, with what is in it
                        info.load_numel = 0
                        info.loaded_weights.clear()
                    raise
                finally:
                    finalize_layerwise_reload(chosen, self._config.model_config)
                for sharer in {self._plan.modules[other] for path in whole for other in self._plan.sharers(path)}:
                    if hasattr(sharer, "quant_method"):  # on the CPU, a tied lm_head has a packed copy of its own
                        sharer.quant_method.process_weights_after_loading(sharer)
        finally:
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)  # nothing reads the bucket any more

    @contextmanager
    def _packing_anew(self, modules: list[torch.nn.Module]) -> Iterator[None]:
        """On the CPU, vLLM packs experts only while it has no kernel for them: a reload would leave them unpacked."""
        methods = [module.quant_method for module in modules if hasattr(module, "quant_method")]
        kernels = [(m, m.moe_kernel) for m in methods if self._device.type == "cpu" and hasattr(m, "moe_kernel")]
        for method, _ in kernels:
            method.moe_kernel = None
        try:
            yield
        except BaseException:
            for method, kernel in kernels:
                method.moe_kernel = kernel
            raise

    def _check_complete(self, update: Update) -> None:
        parts = {module for module in update.filled if not self._is_whole(module)}
        if parts:
            module = min(parts)
            lacking = ", ".join(
                f"{name} has {count} of {needed} elements"
                for name, needed in self._plan.needed[module].items()
                if (count := update.count(module, name)) < needed
            )
            raise Refused(f"the update has only parts of {shown(parts)} (of {module}: {lacking})")
        if left := self.stale - update.filled.keys():
            raise Refused(f"an update that was given up has changed {shown(left)}; send these too")
        for parameter, digests in update.shared.items():
            if parameter.rpartition(".")[0] not in update.filled:
                raise Refused(f"{shown(digests)} came without {parameter}, to which the model ties it")
            if len({tuple(sums.tolist()) for sums in digests.values()}) > 1:
                raise Refused(f"{shown(digests)} are one tensor in the model and differ in the update")

    def _is_whole(self, module: str) -> bool:
        assert self.update is not None
        update, needed = self.update, self._plan.needed[module]
        return all(update.count(module, name) >= elements for name, elements in needed.items())

    def _is_direct(self, path: str) -> bool:
        """Whether a module uses its tensors as they were loaded."""
        module = self._plan.modules[path]
        if path in self._finished_last:
            return False
        if not hasattr(module, "quant_method") or module.quant_method is None:
            return True
        plain = type(module.quant_method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
        return plain and self._device.type == "cuda"


class Only(torch.nn.Module):
    """Stands for a model that has just these modules, for vLLM's reload to walk over."""

    def __init__(self, chosen: list[torch.nn.Module]) -> None:
        super().__init__()
        self._chosen = tuple(chosen)  # a tuple, so that they do not become children

    def modules(self, remove_duplicate: bool = True) -> Iterator[torch.nn.Module]:  # noqa: ARG002
        yield from self._chosen


class Plan:
    """Where the tensors of a trainer go in this rank's model. Learned from the model as they come, and kept."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, shards: int) -> None:
        self._model, self._dtype, self._shards = model, dtype, shards
        self.modules = dict(model.named_modules())
        self.needed: dict[str, dict[str, int]] = {}  # module -> parameter -> elements that make it whole
        self._targets: dict[tuple[str, torch.dtype, tuple[int, ...]], Target] = {}
        holders: dict[int, list[tuple[str, str]]] = {}
        for path, module in self.modules.items():
            for name, parameter in module.named_parameters(recurse=False):
                holders.setdefault(id(parameter), []).append((path, name))
        self._shared = {holder: group for group in holders.values() if len(group) > 1 for holder in group}

    def targets(self, specs: list[Spec]) -> list[Target]:
        """Of each tensor. Raises Refused unless the model can take all of them."""
        unknown = [spec for spec in specs if (spec.name, spec.dtype, spec.shape) not in self._targets]
        if unknown:
            self._learn(unknown)
        return [self._targets[spec.name, spec.dtype, spec.shape] for spec in specs]

    def sharers(self, path: str) -> set[str]:
        """The other modules that hold one of this module's parameters."""
        groups = (group for (holder, _), group in self._shared.items() if holder == path)
        return {holder for group in groups for holder, _ in group if holder != path}

    def _learn(self, specs: list[Spec]) -> None:
        with self._twin() as owners, without_loras(self._model), Recorder(owners) as recorder:
            try:
                self._model.load_weights(recorder.announce(specs, self._dtype))  # type: ignore[operator]
            except (ValueError, KeyError, IndexError, AttributeError, AssertionError, TypeError, RuntimeError) as error:
                # Whatever the loaders of some hundred models throw at what they don't know.
                reason = first_line(error).partition(". The available parameters")[0] or type(error).__name__
                raise Refused(f"{recorder.current} does not fit the model: {reason}") from error
        found = {spec: self._target(spec, recorder.writes.get(spec.name, {})) for spec in specs}
        self._targets.update({(spec.name, spec.dtype, spec.shape): target for spec, target in found.items()})

    def _target(self, spec: Spec, writes: dict[str, tuple[torch.dtype, dict[Region, int]]]) -> Target:
        if not writes:
            return Target(None, spec.dtype)
        if len(writes) > 1:
            raise Refused(f"{spec} belongs to {shown(writes)} at once, which can't be loaded")
        [(path, (dtype, regions))] = writes.items()
        embedding = isinstance(self.modules[path], VocabParallelEmbedding)
        if not embedding and sum(regions.values()) * self._shards < math.prod(spec.shape):
            raise Refused(f"{spec} is larger than what {path} takes of it")  # vLLM's loaders cut it silently
        group = self._shared.get((path, next(iter(regions))[0]))
        shared = ".".join(group[0]) if group else None
        if embedding and group and group[0][0] != path:
            return Target(None, spec.dtype, shared=shared)  # vLLM loads it under the first name only
        kept = dtype if dtype in FLOATS and spec.dtype in FLOATS else spec.dtype
        return Target(path, kept, regions, shared)

    @contextmanager
    def _twin(self) -> Iterator[Owners]:
        """Puts tensors without memory, shaped as the checkpoint fills them, in the place of the model's for a while."""
        owners: Owners = {}
        saved = [(m, dict(m._parameters), dict(m._buffers)) for m in self.modules.values()]
        try:
            for path, module in self.modules.items():
                recorded = get_layerwise_info(module).restore_metadata
                for kept, loaded in zip((module._parameters, module._buffers), recorded, strict=True):
                    for name, tensor in {**kept, **loaded}.items():
                        if tensor is not None:
                            kept[name] = twin = twin_of(tensor, module)
                            owners[storage_id(twin)] = (path, name, twin)
                # What is not recorded, as a scale is, vLLM has made of the weights.
                made = module._parameters.keys() - recorded[0].keys() if recorded[0] else set()
                self.needed[path] = {
                    # vLLM's own word for elements that no checkpoint has
                    name: vars(parameter).get("weight_loader_numel", parameter.numel())
                    for name, parameter in module._parameters.items()
                    if parameter is not None and name not in made and self._must_come(path, name)
                }
            yield owners
        finally:
            for module, parameters, buffers in saved:
                for kept, before in ((module._parameters, parameters), (module._buffers, buffers)):
                    kept.clear()
                    kept.update(before)

    def _must_come(self, path: str, name: str) -> bool:
        """A parameter with several holders is loaded into one of them: of embeddings the first, of others who knows."""
        group = self._shared.get((path, name))
        return group is None or (isinstance(self.modules[path], VocabParallelEmbedding) and group[0][0] == path)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is on, what is written into one of `owners` is noted and not done."""

    def __init__(self, owners: Owners) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners = owners
        self._sources: dict[int, Spec] = {}
        self._alive: list[torch.Tensor] = []  # so that no storage's number is given twice
        self.current: Spec | None = None
        self.writes: dict[str, dict[str, tuple[torch.dtype, dict[Region, int]]]] = {}  # by sent name, then by module

    def announce(self, specs: list[Spec], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """A tensor of each one's shape, of one element of memory; in the model's dtype, lest vLLM logs each cast."""
        for spec in specs:
            source = torch.zeros((), dtype=dtype if spec.dtype in FLOATS else spec.dtype).expand(spec.shape)
            self._sources[storage_id(source)] = self.current = spec
            self._alive.append(source)
            yield spec.name, source

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        copies, fills = func is torch.ops.aten.copy_.default, func is torch.ops.aten.fill_.Scalar
        owner = self._owners.get(storage_id(args[0])) if copies or fills else None
        if owner is None:
            return func(*args, **(kwargs or {}))
        into: torch.Tensor = args[0]
        path, name, tensor = owner
        if not into.numel() or (fills and into.numel() == tensor.numel() > 1):
            return into  # a loader that clears all of a tensor has loaded nothing yet
        spec = self._sources.get(storage_id(args[1]), self.current) if copies else self.current
        assert spec is not None
        if copies and args[1].numel() != into.numel():
            raise ValueError(f"{list(args[1].shape)} would be spread over {list(into.shape)}")
        if copies and spec.dtype.is_floating_point != into.dtype.is_floating_point:
            raise ValueError(f"the model keeps {into.dtype}")
        _, regions = self.writes.setdefault(spec.name, {}).setdefault(path, (into.dtype, {}))
        regions[name, int(into.storage_offset()), tuple(into.shape), tuple(into.stride())] = into.numel()
        return into


class Group:
    """This worker as a rank of a sender's process group, in which rank 0 broadcasts. The keys in the store are those
    that torch makes for a group of this name. Every wait ends after `timeout` seconds."""

    def __init__(self, wanted: dict[str, Any], rank: int) -> None:
        self._name, self._backend = take(wanted, "name", str), take(wanted, "backend", str)
        self._timeout = float(take(wanted, "timeout", int, float))
        address, port = take(wanted, "address", str), take(wanted, "port", int)
        rank, world_size = rank + take(wanted, "rank_offset", int), take(wanted, "world_size", int)
        if self._backend not in ("gloo", "nccl") or not 0 < rank < world_size:
            raise Refused(f"rank {rank} of {world_size} by {self._backend} can't receive from a sender")
        deadline = timedelta(seconds=self._timeout)
        try:
            store: Any = dist.TCPStore(address, port, world_size, is_master=False, timeout=deadline)
            for prefix in (self._name, f"{self._name}/", "cpu/" if self._backend == "gloo" else "cuda/"):
                store = dist.PrefixStore(prefix, store)
            if self._backend == "gloo":
                self._group: Any = dist.ProcessGroupGloo(store, rank, world_size, deadline)
            else:
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = 2 * deadline + timedelta(minutes=1)
                with settings(NCCL_SETTINGS):
                    self._group = dist.ProcessGroupNCCL(store, rank, world_size, options)
        except RuntimeError as error:  # torch's own DistError among them
            raise Refused(f"could not join group {self._name} at {address}:{port}: {first_line(error)}") from error

    def receive(self, specs: list[Spec], device: torch.device) -> list[torch.Tensor]:
        """What rank 0 broadcasts next: these tensors, in this order."""
        place = torch.device("cpu") if self._backend == "gloo" else device
        tensors = [torch.empty(spec.shape, dtype=spec.dtype, device=place) for spec in specs]
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            works = []
            for tensor in tensors:
                works.append(self._group.broadcast([tensor], options))
                if self._backend == "gloo":
                    works.pop().wait()
            self._await(works)
        except RuntimeError as error:
            raise Refused(f"group {self._name}: the broadcast did not come: {first_line(error)}") from error
        return tensors

    def _await(self, works: list[Any]) -> None:
        """NCCL's own wait ends with the queueing; this one with the arrival."""
        ends = time.monotonic() + self._timeout
        while works and not works[-1].is_completed():
            if time.monotonic() > ends:
                self._group.abort()
                raise RuntimeError(f"not within {self._timeout:.0f} s; the group is broken, leave it")
            time.sleep(0.0005)
        for work in works:
            work.wait()

    def close(self) -> None:
        self._group.shutdown()


def mapped(path: str) -> torch.Tensor:
    """The bytes of a memory file, without a copy. Its pages are private: nothing here can write to the sender's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Refused(f"{path} is no file")
            return torch.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise Refused(f"could not map {path}: {error}") from error


def opened(share: dict[str, Any], nbytes: int, device: torch.device) -> torch.Tensor:
    """The bytes of another process's GPU memory, by CUDA IPC. The share is used up."""
    if device.type != "cuda":
        raise Refused("CUDA IPC needs an engine on a GPU")
    index = torch.cuda.current_device()  # this rank's: vLLM sets it
    wanted, own = take(share, "device", str), str(torch.cuda.get_device_properties(index).uuid)
    size = take(share, "storage_bytes", int)
    if wanted != own:
        raise Refused(f"the share is on GPU {wanted}, this rank on {own}")
    if not 0 < nbytes <= size:
        raise Refused(f"a bucket of {nbytes} bytes in a share of {size}")
    try:
        memory: torch.Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
            *(torch.Tensor, torch.Size([nbytes]), (1,), 0, torch.UntypedStorage, torch.uint8, index),
            *(take_bytes(share, "handle"), size, take(share, "storage_offset", int), False),
            *(take_bytes(share, "ref_counter_handle"), take(share, "ref_counter_offset", int)),
            *(take_bytes(share, "event_handle"), take(share, "event_sync_required", bool)),
        )
    except RuntimeError as error:
        raise Refused(f"could not open the share: {first_line(error)}") from error
    return memory


def views(buffer: torch.Tensor, specs: list[Spec]) -> list[torch.Tensor]:
    """The tensors in a bucket's bytes, without a copy."""
    for spec in specs:
        if spec.offset + spec.nbytes > buffer.nbytes or spec.offset % spec.dtype.itemsize:
            raise Refused(f"{spec} lies at {spec.offset} in a bucket of {buffer.nbytes} bytes")
    return [buffer[s.offset : s.offset + s.nbytes].view(s.dtype).view(s.shape) for s in specs]


def spec_of(tensor: Any) -> Spec:
    if not isinstance(tensor, dict):
        raise Refused("a tensor's description is a JSON object")
    name, dtype = take(tensor, "name", str), take(tensor, "dtype", str)
    shape, offset, nbytes = take(tensor, "shape", list), take(tensor, "offset", int), take(tensor, "nbytes", int)
    if dtype not in DTYPES:
        raise Refused(f"{name}: the dtype {dtype} is not known here")
    if not all(type(size) is int and size >= 0 for size in shape) or offset < 0:
        raise Refused(f"{name}: shape {shape} at {offset}")
    spec = Spec(name, DTYPES[dtype], tuple(shape), offset, nbytes)
    if nbytes != math.prod(shape) * spec.dtype.itemsize:
        raise Refused(f"{spec} does not have {nbytes} bytes")
    return spec


def parsed(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (TypeError, ValueError) as error:
        raise Refused(f"no JSON: {error}") from error
    if not isinstance(content, dict):
        raise Refused("a JSON object was expected")
    return content


def take(content: dict[str, Any], key: str, *kinds: type[T]) -> T:
    value = content.get(key)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise Refused(f"{key} is {value!r:.80}, not of type {kinds[-1].__name__}")
    return value


def take_bytes(content: dict[str, Any], key: str) -> bytes:
    try:
        return base64.b64decode(take(content, key, str), validate=True)
    except ValueError as error:
        raise Refused(f"{key} is not in base64") from error


def twin_of(tensor: torch.Tensor, module: torch.nn.Module) -> Any:
    """A tensor like this one, loader and all, without memory."""
    twin: Any = restore_layer_refs(to_meta_tensor(tensor), module)
    if hasattr(twin, "weight_loader"):
        loader = twin.weight_loader
        while loader.__name__ == "online_process_loader":  # the reload's, around the one that the module has
            loader = loader.__wrapped__
        twin.weight_loader = loader
    return twin


def unpacked(module: Any) -> torch.Tensor:
    """The weight that a linear layer computes with on the CPU, [N, K]. Its kernel has packed it and can't be asked, but
    applied to the rows of the identity it gives every element back as it is (but for the sign of a zero)."""
    recorded = get_layerwise_info(module).restore_metadata[0]["weight"]
    weight = torch.empty(recorded.shape, dtype=recorded.dtype)
    identity = torch.eye(weight.shape[1], dtype=weight.dtype)
    for start in range(0, len(identity), PROBE_ROWS):
        rows = identity[start : start + PROBE_ROWS]
        weight[:, start : start + PROBE_ROWS] = module.cpu_linear(rows, module.weight, None).T
    return weight


@contextmanager
def without_loras(model: torch.nn.Module) -> Iterator[None]:
    """The model without vLLM's wrappers for adapters, whose parameters have names that the loaders of vLLM before 0.32
    do not know."""
    wrapped = [
        (parent._modules, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if isinstance(child, BaseLayerWithLoRA)
    ]
    for children, name, child in wrapped:
        children[name] = child.base_layer
    try:
        yield
    finally:
        for children, name, child in wrapped:
            children[name] = child


@contextmanager
def settings(wanted: dict[str, str]) -> Iterator[None]:
    """These variables of the environment, as long as the block runs."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def sampled(tensors: list[torch.Tensor]) -> list[str]:
    """Of each (contiguous), two sums over up to 8,192 of its elements, taken as integers: all of them, or blocks that
    are spread evenly. The sender makes the same of what it sends (`millrace.checksum.sampled_checksums`)."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    alike: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((kinds[tensor.itemsize], tensor.numel() > SAMPLE), []).append(index)

    def blocks(tensor: torch.Tensor) -> torch.Tensor:
        step = (tensor.numel() - SAMPLE_WIDTH) // (SAMPLE_BLOCKS - 1)
        return tensor.as_strided((SAMPLE_BLOCKS, SAMPLE_WIDTH), (step, 1))

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided((tensor.numel(),), (1,))

    # Few calls of torch for each tensor, since there are hundreds and an engine stands still meanwhile.
    sums: dict[int, list[int]] = {}
    with torch.no_grad():
        for (kind, large), indices in alike.items():
            for start in range(0, len(indices), SAMPLED_TOGETHER):
                some = indices[start : start + SAMPLED_TOGETHER]
                views = [(blocks if large else whole)(tensors[index]).view(kind) for index in some]
                stacked = torch.stack(views) if large else torch.nn.utils.rnn.pad_sequence(views, batch_first=True)
                samples_NE = stacked.flatten(1).to(torch.int64)
                places_E = torch.arange(1, samples_NE.shape[1] + 1, device=samples_NE.device)
                made = torch.stack((samples_NE.sum(1), (samples_NE * places_E).sum(1)), 1).tolist()
                sums.update(zip(some, made, strict=True))
    return ["".join(f"{number & (2**64 - 1):016x}" for number in sums[index]) for index in range(len(tensors))]


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """[2] int64 on the tensor's device: the sum of its bytes, eight as one integer, and that sum with each integer
    weighted by its place; both modulo 2^64. A changed element changes the first, one that moved far the second."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(content) % 8 or content.storage_offset() % 8:
        content = torch.nn.functional.pad(content, (0, -len(content) % 8))
    lanes = content.view(torch.int64)
    places = torch.arange(1, min(len(lanes), SUM_LANES) + 1, device=tensor.device)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, len(lanes), SUM_LANES):
        some = lanes[start : start + SUM_LANES]
        total = some.sum()
        sums += torch.stack((total, (some * places[: len(some)]).sum() + start * total))
    return sums


def storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def shown(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
