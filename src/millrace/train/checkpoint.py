"""Checkpoints of a trainer's whole state, each of them complete or absent.

`RUN/checkpoints/step-00000010/` has the shards of torch.distributed.checkpoint, and `state.json` with all that is not a
tensor. It is written under a name that starts with a dot, flushed to disk, and renamed last. If the ranks are on
several hosts, RUN must be on a shared file system.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from transformers import PreTrainedTokenizerBase

from millrace.errors import CheckpointError
from millrace.model_folder import to_disk
from millrace.train.optimizer import optimizer_state
from millrace.train.policy import Policy
from millrace.train.trainer import Trainer
from millrace.train.world import World

logger = logging.getLogger(__name__)

FORMAT = 1
STATE_FILE = "state.json"


def save(run_dir: Path, trainer: Trainer, extra: Mapping[str, object], *, keep: int) -> Path:
    """Save weights, optimizer, reference, step and `extra`, and return the checkpoint's folder. Collective.

    extra: JSON values; those of rank 0 are saved. keep: how many checkpoints remain; older ones are deleted. Raises
    CheckpointError if the checkpoint can't be written. Then nothing of it is left, and earlier checkpoints are
    unchanged.
    """
    world = trainer.world
    world.make_current()
    folder = run_dir / "checkpoints" / f"step-{trainer.step:08d}"
    partial = _hidden(folder, "partial")
    state = json.dumps({"format": FORMAT, "step": trainer.step, "extra": dict(extra)}, indent=1)

    def finish() -> None:
        _write_synced(partial / STATE_FILE, state)
        _publish(partial, folder)
        for old in _checkpoints(run_dir)[:-keep]:
            _delete(old)

    with _whole_or_absent(world, partial, needed=_bytes(trainer)):
        _on_rank_0(world, lambda: _clear(folder.parent))
        with _no_process_group_is_fine():
            dcp.save(_tensors(trainer), storage_writer=_Writer(partial), no_dist=world.size == 1)
        _on_rank_0(world, finish)
    return folder


def latest(run_dir: Path) -> Path | None:
    """Return the folder of a run's last complete checkpoint; None if there is none."""
    folders = _checkpoints(run_dir)
    return folders[-1] if folders else None


def load_latest(run_dir: Path, trainer: Trainer) -> tuple[Path, dict[str, object]]:
    """Load the newest checkpoint that can be read, and return its folder and its `extra`. Collective.

    Newer checkpoints that are damaged are renamed to `step-N.damaged`, and this is logged. Raises the CheckpointError
    of the newest checkpoint if none can be read.
    """
    first: CheckpointError | None = None
    damaged: list[Path] = []
    for folder in reversed(_checkpoints(run_dir)):
        try:
            extra = load(folder, trainer)
        except CheckpointError as error:
            first = first or error
            damaged.append(folder)
            continue
        _on_rank_0(trainer.world, lambda: _set_aside(damaged))
        if first is not None and trainer.world.rank == 0:
            logger.warning("%s; resuming from the earlier checkpoint %s", first, folder)
        return folder, extra
    raise first or CheckpointError(f"{run_dir} has no checkpoint")


def load(folder: Path, trainer: Trainer) -> dict[str, object]:
    """Load a checkpoint into a trainer of the same model, and return the `extra` that was saved. Collective.

    The number of ranks may differ from the one that saved. The optimizer's settings remain those of the trainer's
    config. Raises CheckpointError if the checkpoint is missing, damaged, or of another model. The trainer's state is
    then undefined.
    """
    world = trainer.world
    world.make_current()
    try:
        state = json.loads((folder / STATE_FILE).read_bytes())
        if state["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {folder} has format {state['format']}; this version reads {FORMAT}")
        step, extra = int(state["step"]), dict(state["extra"])
        with _no_process_group_is_fine():
            dcp.load(_tensors(trainer), checkpoint_id=folder, no_dist=world.size == 1)
    except (OSError, ValueError, KeyError, TypeError, CheckpointException) as error:
        raise CheckpointError(
            f"checkpoint {folder} can't be read: {_reason(error)}. It must be complete, and the model and "
            "train.loss.kl_coefficient must be those that it was saved with"
        ) from error
    trainer.step = step
    return extra


def export(policy: Policy, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write the policy, and its tokenizer if given, as a model folder from which an engine can start. Collective.

    The weights are safetensors in float32. An existing `folder` is replaced. Rank 0 needs memory for all weights.
    Raises CheckpointError if the folder can't be written.
    """
    world = policy.world
    partial = _hidden(folder, "partial")
    tensors: dict[str, Tensor] = {}
    for name, tensor in policy.named_tensors():
        if world.rank == 0:
            tensors[name] = tensor.cpu()

    def write() -> None:
        _delete(partial)
        policy.model.save_pretrained(partial, state_dict=tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _publish(partial, folder)

    with _whole_or_absent(world, partial, needed=sum(t.nbytes for t in tensors.values())):
        _on_rank_0(world, write)


class _Writer(dcp.FileSystemWriter):  # type: ignore[misc]
    """A FileSystemWriter that raises the OSError when writing fails.

    torch's archive writer raises its own error ("unexpected pos"). The OSError is only the context of that error, and
    the exchange between ranks drops it.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise _disk_error(error) or error from None


def _disk_error(error: BaseException | None) -> OSError | None:
    if error is None or isinstance(error, OSError):
        return error
    return _disk_error(error.__context__)


def _tensors(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Return the trainer's tensors themselves, not copies: dcp loads a checkpoint into them in place."""
    trainer.ensure_reference()
    tensors = {
        "model": trainer.policy.state(),
        "optimizer": optimizer_state(trainer.optimizer, trainer.policy.parameters()),
    }
    reference = trainer.policy.reference_state()
    return {**tensors, "reference": reference} if reference else tensors


def _bytes(trainer: Trainer) -> int:
    return sum(tensor.nbytes for part in _tensors(trainer).values() for tensor in part.values())


def _checkpoints(run_dir: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    names = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)] if folder.is_dir() else []
    return sorted(names, key=lambda path: int(path.name.removeprefix("step-")))


def _hidden(folder: Path, why: str) -> Path:
    return folder.with_name(f".{folder.name}.{why}")


def _clear(parent: Path) -> None:
    """Create the folder, and delete incomplete checkpoints that a killed process left in it."""
    parent.mkdir(parents=True, exist_ok=True)
    for path in parent.glob(".step-*"):
        shutil.rmtree(path)


def _delete(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that a process killed half-way leaves nothing like a checkpoint."""
    if folder.exists():
        hidden = _hidden(folder, "deleted")
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _set_aside(damaged: list[Path]) -> None:
    """Rename damaged checkpoints, so that they don't count among the checkpoints to keep."""
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def _publish(partial: Path, folder: Path) -> None:
    for path in [*partial.iterdir(), partial]:
        to_disk(path)
    _delete(folder)
    partial.rename(folder)
    to_disk(folder.parent)


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text)
    to_disk(path)


def _on_rank_0(world: World, action: Callable[[], None]) -> None:
    """Run an action on rank 0. If it fails, every rank raises, so that none waits in the next collective."""
    failure: OSError | SafetensorError | None = None
    if world.rank == 0:
        try:
            action()
        except (OSError, SafetensorError) as error:
            failure = error
    if world.any(failure is not None):
        raise failure if failure is not None else OSError("rank 0 failed; its log says why")


@contextmanager
def _whole_or_absent(world: World, partial: Path, *, needed: int) -> Iterator[None]:
    """Turn errors of the block into CheckpointError, and delete the partial folder after any failure."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        if isinstance(error, CheckpointException) and _interrupted(error):
            raise KeyboardInterrupt from error
        raise CheckpointError(
            f"the checkpoint of {needed / 1e6:.1f} MB could not be written to {partial.parent}: {_reason(error)}. "
            "Nothing of it was kept; earlier checkpoints are intact"
        ) from error
    finally:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _interrupted(error: CheckpointException) -> bool:
    """Return whether the cause is Ctrl-C, which dcp wraps like any failure."""
    return any(isinstance(failure, KeyboardInterrupt) for failure, _ in error.failures.values())


def _reason(error: BaseException) -> str:
    """Return the failure itself in one line, without the tracebacks that dcp adds."""
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({_reason(failure) for failure, _ in error.failures.values()}))
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _no_process_group_is_fine() -> Iterator[None]:
    """Suppress dcp's warning about a missing process group, which it gives in spite of `no_dist`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
