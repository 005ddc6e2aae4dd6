"""Seconds of TRL's GRPOTrainer on GPUs: with its own vLLM, and on a Millrace fleet of vLLM or of SGLang.

    python -m benchmarks.gpu.trl_steps [--size 0.5b] [--ways colocate server ...] [--steps 3] [--engine JSON]

All have the same model with random weights in bfloat16, 64 prompts of 128 tokens, 8 completions of up to 512 tokens for
each, and microbatches of 16. Each way is a process of its own, and the ways run one after the other:

    colocate        TRL's vLLM in the trainer's process, on the trainer's GPU
    server          TRL's vLLM as a server on a second GPU; TRL sends the weights by NCCL
    vllm, sglang    a fleet of one engine on the trainer's GPU; Millrace sends the weights by CUDA IPC
    vllm-2, sglang-2    a fleet of one engine on a second GPU; Millrace sends the weights by NCCL

What is printed: the medians of the steps after the first. `generate` is the call that returns 512 completions,
`publish` the call that sends the weights to the engine, and `step` the whole step of the trainer.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import QWEN2, write_config, write_tokenizer
from millrace.config.models import TransportName
from millrace.sync import Fleet, open_fleet

PROMPTS, SAMPLES, PROMPT_TOKENS, TOKENS, MICROBATCH = 64, 8, 128, 512, 16
MEMORY = 0.4  # the engine's share of its GPU
PORT, START_SECONDS = 8765, 300
WAYS = ("colocate", "server", "vllm", "sglang", "vllm-2", "sglang-2")


def make_model(size: str, folder: Path, device: str) -> None:
    """Write a model with random weights and a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_config(size, folder)
    write_tokenizer(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def engine(way: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the fleet's engine."""
    kind = way.removesuffix("-2")
    settings = {"kind": kind, "max_running_requests": PROMPTS * SAMPLES, **json.loads(given.engine).get(kind, {})}
    if given.device == "cpu":
        return {**settings, "device": "cpu"}
    settings["mem_fraction_static" if kind == "sglang" else "gpu_memory_utilization"] = MEMORY
    if way.endswith("-2"):
        settings["cuda_visible_devices"] = "1"
    return settings


def fleet_of(way: str, given: argparse.Namespace, logs: Path) -> AbstractContextManager[Fleet]:
    """Open the fleet. Its engine is on the trainer's GPU, or on a second one."""
    sends: TransportName = "nccl" if way.endswith("-2") else "auto"
    return open_fleet(engine(way, given), given.model, log_dir=logs, transport=sends)


@contextmanager
def trl_server(model: Path) -> Iterator[None]:
    """Run vLLM's server on the second GPU, as `trl vllm-serve` of TRL 1.16 does."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(PORT)]
    command += ["--host", "127.0.0.1", "--gpu-memory-utilization", str(MEMORY), "--max-model-len", "4096"]
    command += ["--max-num-seqs", str(PROMPTS * SAMPLES), "--weight-transfer-config", '{"backend": "nccl"}']
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with (model / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        until_healthy(server)
        yield
    except BaseException:
        print((model / "server.log").read_text()[-3000:], flush=True)
        raise
    finally:
        server.terminate()
        server.wait(60)


def until_healthy(server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers. Raises RuntimeError if it ends before, or takes too long."""
    for _ in range(START_SECONDS):
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
            return
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}")
        time.sleep(1)
    raise RuntimeError(f"the server is not healthy after {START_SECONDS} s")


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return the function, with the seconds of each call appended to `seconds`."""
    import torch

    def call(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        return result

    return call


def measure(way: str, given: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Train in this process, and return the seconds of each step's parts."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from millrace.integrations.trl import use_fleet

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc] # untyped
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    draw = random.Random(0)
    prompts = ["".join(draw.choices(string.ascii_letters, k=PROMPT_TOKENS)) for _ in range(1024)]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    reward: Callable[..., list[float]] = lambda completions, **_: [float(len(c) % 7) for c in completions]  # noqa: E731
    reward.__name__ = "reward"
    own = {} if way not in ("colocate", "server") else {
        "use_vllm": True,
        "vllm_mode": way,
        "vllm_gpu_memory_utilization": MEMORY,
        "vllm_max_model_length": 4096,
        "vllm_server_base_url": f"http://127.0.0.1:{PORT}" if way == "server" else None,
        "vllm_server_timeout": 240.0,
    }  # fmt: skip
    config = GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=given.device == "cpu",
        bf16=True,
        per_device_train_batch_size=MICROBATCH,
        gradient_accumulation_steps=given.prompts * SAMPLES // MICROBATCH,
        num_generations=SAMPLES,
        max_completion_length=given.tokens,
        max_steps=given.steps + 1,
        learning_rate=1e-7,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16"},
        **own,
    )
    with trl_server(given.model) if way == "server" else nullcontext():
        trainer = GRPOTrainer(
            model=str(given.model),
            args=config,
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        with nullcontext() if own else fleet_of(way, given, folder / "logs") as fleet:
            if fleet is not None:
                use_fleet(trainer, fleet)
            generation, generate, publish = trainer.vllm_generation, list[float](), list[float]()
            generation.generate = timed(generation.generate, generate)
            generation.sync_weights = timed(generation.sync_weights, publish)
            trainer.train()
    assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} == {PROMPT_TOKENS}
    steps = [end - begin for begin, end in itertools.pairwise(ends)]
    return {"generate": generate[1:], "publish": publish[1:], "step": steps}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=QWEN2, default="0.5b")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--engine", default="{}", help='settings of the fleet\'s engines, as {"vllm": {...}}')
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(given.one, given, Path(folder))))
        return
    with tempfile.TemporaryDirectory() as place:
        make_model(given.size, Path(place), given.device)
        for way in given.ways:
            started = time.perf_counter()
            command = [sys.executable, "-m", "benchmarks.gpu.trl_steps", *sys.argv[1:], "--one", way, "--model", place]
            # The trainer would use every GPU that it sees.
            environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{given.size}, {way}: failed, {done.returncode}", flush=True)
                continue
            parts = json.loads(done.stdout.splitlines()[-1])
            told = ", ".join(f"{name} {statistics.median(took):.3f} s" for name, took in parts.items())
            took = time.perf_counter() - started
            print(f"{given.size}, {way}: {told} (steps {parts['step']}; {took:.0f} s in all)", flush=True)


if __name__ == "__main__":
    main()
