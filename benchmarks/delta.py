"""Measures how much of a model's bfloat16 weights one optimizer step changes: the share of the elements, the bytes of a
delta, and the seconds to write and to apply it.

    python -m benchmarks.delta [--size 0.5b] [--part 4] [--lr 1e-6 3e-6 1e-5] [--repeats 5] [--device cuda]

The model has the shape of Qwen2.5 and a float32 master copy. `--part 4` keeps a quarter of the layers and of the
vocabulary. Each step is a real one, of the trainer's own optimizer on the gradient of its own policy loss. The steps
before the first measured one fill AdamW's moments. But the weights are random, at the scale that training starts from,
and so are the tokens and their rewards. A trained model has other weights, and its gradients point somewhere, so
another share of it changes.

A delta is written to a file and read from it on one thread, including the checksums of both sides. The floor of writing
is to read both versions once and compare them. The floor of applying is to copy the old version into memory that was
touched before. `apply` returns new memory, whose pages are faulted in.

A sidecar applies the delta to a folder and writes the next version's folder, in CPU seconds of one thread. Its floor
is to copy the old folder's files. All files are below TMPDIR.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.gpu.models import QWEN2
from millrace.config.models import LossConfig, OptimizerConfig
from millrace.train.loss import group_advantages, policy_loss
from millrace.train.optimizer import apply_gradients, global_grad_norm, make_optimizer
from millrace.weights.delta import read_delta, write_delta
from millrace.weights.mirror import CheckpointMirror
from millrace.weights.plan import buckets
from millrace.weights.store import VersionStore

WARMUP_STEPS = 4
SAMPLES, TOKENS = 8, 32  # samples of a group, tokens of a sample
COMPARED = 1 << 20  # elements at a time, as in the delta's chunks

Weights = dict[str, Tensor]


def make_model(size: str, part: int, device: str) -> Qwen2ForCausalLM:
    shape = QWEN2[size]
    config = Qwen2Config(
        vocab_size=(1024 if size == "tiny" else 151_936) // part,
        hidden_size=shape["hidden_size"],
        num_hidden_layers=max(1, shape["layers"] // part),
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["intermediate_size"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).float().to(device)


def step(model: Qwen2ForCausalLM, optimizer: torch.optim.AdamW, lr: float, rng: np.random.Generator) -> None:
    """Makes one update on a group of random samples with random rewards."""
    tokens_BT = torch.from_numpy(rng.integers(0, model.config.vocab_size, (SAMPLES, TOKENS))).to(model.device)
    logits_BTV = model(input_ids=tokens_BT).logits[:, :-1].float()
    logprobs_BT = logits_BTV.log_softmax(dim=-1).gather(-1, tokens_BT[:, 1:, None]).squeeze(-1)
    sampled_BT = logprobs_BT.detach()
    advantages_B = torch.from_numpy(group_advantages(rng.random(SAMPLES).tolist(), normalize=True)).to(model.device)
    mask_BT = torch.ones_like(sampled_BT, dtype=torch.bool)
    tokens = mask_BT.numel()
    result = policy_loss(
        logprobs_BT, sampled_BT, sampled_BT, None, mask_BT, advantages_B, config=LossConfig(), normalizer=tokens
    )
    result.loss.backward()  # type: ignore[no-untyped-call]
    norm = global_grad_norm(model.parameters())
    apply_gradients(optimizer, grad_norm=norm, max_grad_norm=1.0, lr=lr)


def cast(model: Qwen2ForCausalLM) -> Weights:
    """Returns the weights as they would be published."""
    return {name: parameter.detach().bfloat16().cpu() for name, parameter in model.named_parameters()}


def compare(old: Weights, new: Weights) -> None:
    different = np.empty(COMPARED, np.bool_)
    for name, tensor in new.items():
        one, two = (weights.reshape(-1).view(torch.int16).numpy() for weights in (old[name], tensor))
        for begin in range(0, one.size, COMPARED):
            part = slice(begin, begin + COMPARED)
            np.not_equal(one[part], two[part], out=different[: one[part].size])


def copy(old: Weights, copies: Weights) -> None:
    for name, tensor in old.items():
        copies[name].copy_(tensor)


def apply(path: Path, old: Weights) -> None:
    delta = read_delta(path)
    for name, tensor in old.items():
        delta.apply(name, tensor)


def bring(store: VersionStore, place: Path) -> tuple[float, float]:
    """Has a new sidecar bring both versions, and copies the folder of the first one. Returns the CPU seconds of the
    second version, and of the copy."""
    mirror = CheckpointMirror(store.url, place / "replica")
    first, _ = mirror.bring(1)
    started = time.process_time()
    mirror.bring(2)
    brought = time.process_time()
    shutil.copytree(first, place / "copy")
    copied = time.process_time()
    mirror.close()
    shutil.rmtree(place)
    return brought - started, copied - brought


def measure_sidecar(old: Weights, new: Weights, repeats: int, place: Path) -> None:
    (place / "model").mkdir(parents=True)
    (place / "model" / "config.json").write_text("{}")
    store = VersionStore(str(place / "store"), place / "model", keep=2, anchor_every=10)
    for version, weights in ((1, old), (2, new)):
        store.write(version, buckets(weights.items(), 2**28))
        store.secure(version)
    brought, copied = zip(*(bring(store, place / "sidecar") for _ in range(repeats)), strict=True)
    store.close()
    gigabytes = sum(tensor.nbytes for tensor in old.values()) / 1e9
    spent, floor = statistics.median(brought), statistics.median(copied)
    print(
        f"  sidecar {spent:.3f} s of CPU ({gigabytes / spent:.2f} GB/s a core; least {min(brought):.3f} s), copy of "
        f"files {floor:.3f} s ({gigabytes / floor:.2f}), ratio {spent / floor:.2f}",
        flush=True,
    )
    shutil.rmtree(place)


def in_turns(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Runs the works in turns. Returns the median seconds of each."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, spent in zip(works, seconds, strict=True):
            started = time.perf_counter()
            work()
            spent.append(time.perf_counter() - started)
    return [statistics.median(spent) for spent in seconds]


def measure(old: Weights, new: Weights, lr: float, repeats: int, path: Path) -> None:
    report = write_delta(path, 1, 2, ((name, old[name], new[name]) for name in new))
    delta, copies = read_delta(path), {name: tensor.clone() for name, tensor in old.items()}
    for name, tensor in new.items():
        assert torch.equal(delta.apply(name, old[name]).view(torch.int16), tensor.view(torch.int16))
    compared, written, copied, applied = in_turns(
        repeats,
        lambda: compare(old, new),
        lambda: write_delta(path, 1, 2, ((name, old[name], new[name]) for name in new)),
        lambda: copy(old, copies),
        lambda: apply(path, old),
    )
    gigabytes = report.nbytes / 1e9
    print(
        f"lr {lr:.0e}: {report.changed / report.elements:.2%} of the elements changed; {report.nbytes / 1e6:.1f} MB, "
        f"delta {report.wire_nbytes / 1e6:.2f} MB, 1/{report.nbytes / report.wire_nbytes:.1f} "
        f"({report.wire_nbytes * 8 / report.changed:.2f} bits for each that changed)\n"
        f"  write {written:.3f} s ({gigabytes / written:.2f} GB/s), compare {compared:.3f} s "
        f"({gigabytes / compared:.2f}), ratio {written / compared:.2f}\n"
        f"  apply {applied:.3f} s ({gigabytes / applied:.2f} GB/s), copy {copied:.3f} s "
        f"({gigabytes / copied:.2f}), ratio {applied / copied:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sorted(QWEN2), default="0.5b")
    parser.add_argument("--part", type=int, default=4)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 3e-6, 1e-5])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # this limits the copy too
    model = make_model(arguments.size, arguments.part, arguments.device)
    optimizer = make_optimizer(model.parameters(), OptimizerConfig(lr=arguments.lr[0]))
    rng = np.random.default_rng(0)
    for _ in range(WARMUP_STEPS):
        step(model, optimizer, arguments.lr[0], rng)
    with tempfile.TemporaryDirectory() as made:
        for lr in arguments.lr:
            old = cast(model)
            step(model, optimizer, lr, rng)
            new = cast(model)
            measure(old, new, lr, arguments.repeats, Path(made) / "delta.safetensors")
            measure_sidecar(old, new, arguments.repeats, Path(made) / "sidecar")


if __name__ == "__main__":
    main()
