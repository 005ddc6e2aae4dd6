"""Seconds a step of TRL's GRPOTrainer alone and on a Millrace fleet, and of Millrace's own loop.

    python -m benchmarks.trl_steps [--rounds 3] [--steps 8] [--threads 1 2] [--turns single multi]

All have the same tiny model, prompts, batch (16 groups of 8) and learning rate. `single`: one turn of up to 28 tokens.
`multi`: the model counts down from a number in the prompt with a calculator, one call a turn. The numbers are drawn,
few of them large, so that conversations have a long tail of turns. The model has learnt that before, by supervised
steps.

The ways:

    trl          TRL alone
    use_fleet    TRL, with its own tool loop, on a fleet
    rollout      TRL, with FleetRollout
    millrace     `millrace train`

Ways that end in -short have `tokens_per_pass`, and leave out TRL's correction of its loss by the engine's logprobs, as
TRL alone does: the embedded engine computes like the trainer.

`threads` are the trainer's, and those of TRL's own generation. They sleep while they wait. The fleet has two engines of
one thread each. Rounds are interleaved, and each run is a process of its own. The first step of each run does not
count.

What is printed, for each way: the median seconds of a step, TRL's over it, the medians of the parts of a step
(benchmarks/trl_parts.py) and of its CPU seconds, and the tokens of a batch with the positions that TRL pads it to.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GROUPS, SAMPLES = 16, 8
HIGHEST = 8  # to count down from
PASS = 1 << 13  # tokens in a forward pass of `millrace` and of the ways that end in -short
TEMPERATURE = 0.3  # so that the model makes no mistakes, and all ways have the same conversations
COMPLETION = {"single": 28, "multi": 420}  # tokens
WAYS = {
    "single": ("trl", "use_fleet", "use_fleet-short", "millrace"),
    "multi": ("trl", "use_fleet", "use_fleet-short", "rollout", "rollout-short", "millrace"),
}
PARTS = ("generate", "publish", "score", "train")  # of a step
Step = dict[str, float]  # of `step` and PARTS the seconds, `cpu` seconds; `tokens` and padded `positions` of the batch
ENGINES = {"kind": "embedded", "replicas": 2, "threads": 1}


def numbers(seed: int, count: int) -> Iterator[int]:
    """Numbers to count down from: half of them 1, a quarter 2, and so on."""
    draw = random.Random(seed)
    for _ in range(count):
        number = 1
        while number < HIGHEST and draw.random() < 0.5:
            number += 1
        yield number


def question(number: int) -> str:
    return f"Anna has {number} apples."


def call_text(number: int) -> str:
    call = {"name": "calculator", "arguments": {"expression": f"{number} - 1"}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def make_model(folder: Path) -> None:
    """A tiny model that counts down."""
    import torch
    from transformers import AutoModelForCausalLM

    from millrace.config.sources import TinyModelConfig
    from millrace.rollout.chat import load_chat_format
    from millrace.rollout.tools import Calculator
    from millrace.train.tiny import make_tiny_model

    make_tiny_model(TinyModelConfig(kind="tiny", context_length=512), 0, folder)
    chat = load_chat_format(str(folder), [Calculator().schema])
    ids = torch.full((HIGHEST, 512), chat.end_of_turn)
    labels = torch.full_like(ids, -100)
    for row, highest in enumerate(range(1, HIGHEST + 1)):
        parts = [(chat.prompt(question(highest)), False)]
        for number in range(highest, 0, -1):
            parts += [(chat.turn(call_text(number)), True), (chat.continuation([str(number - 1)]), False)]
        parts.append((chat.turn("#### 0"), True))
        tokens = [token for part, _ in parts for token in part]
        own = [learnt for part, learnt in parts for _ in part]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, : len(tokens)] = torch.tensor(
            [t if learnt else -100 for t, learnt in zip(tokens, own, strict=True)]
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.tensor(torch.inf)
    while loss > 0.003:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression.

    Args:
        expression: Numbers and operators.
    """
    from millrace.rollout.tools import evaluate, format_number

    return format_number(evaluate(expression))


def trl_steps(way: str, turns: str, steps: int, model: Path, folder: Path) -> list[Step]:
    """Train with TRL in this process, and return the steps after the first."""
    from contextlib import nullcontext

    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen3_template

    from benchmarks.trl_parts import Parts
    from millrace.integrations.trl import FleetRollout, use_fleet
    from millrace.sync import open_fleet

    short = way.endswith("-short")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = qwen3_template
    prompts = [[{"role": "user", "content": question(number)}] for number in numbers(1, 1024)]
    extra: dict[str, Any] = {}
    if turns == "multi":
        own = {"rollout_func": FleetRollout(tokenizer, [calculator], max_turns=HIGHEST + 2)}
        extra = own if way.startswith("rollout") else {"tools": [calculator]}
    reward: Callable[..., list[float]] = lambda completions, **_: [float(len(str(c)) % 7) for c in completions]  # noqa: E731
    reward.__name__ = "reward"
    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=GROUPS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=COMPLETION[turns],
        temperature=TEMPERATURE,
        vllm_importance_sampling_correction=not short,
        max_steps=steps + 1,
        learning_rate=1e-7,  # all steps do the same
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=str(model),
        args=config,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        **extra,
    )
    with nullcontext() if way == "trl" else open_fleet(ENGINES, model, log_dir=folder / "logs") as fleet:
        if fleet is not None:
            use_fleet(trainer, fleet, tokens_per_pass=PASS if short else None)
        parts = Parts(trainer)
        trainer.train()
    return parts.steps[1:]


def millrace_steps(turns: str, threads: int, steps: int, model: Path, folder: Path) -> list[Step]:
    """Train with `millrace train`, and return the steps after the first."""
    rows = [{"question": question(number), "answer": "#### 0"} for number in numbers(1, 1024)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    multi = turns == "multi"
    config = {
        "name": "run",
        "output_dir": str(folder),
        "model": {"kind": "pretrained", "path": str(model)},
        "engine": ENGINES,
        "data": {"kind": "file", "path": str(data)},
        "rollout": {
            "groups_per_step": GROUPS,
            "samples_per_group": SAMPLES,
            "max_turns": HIGHEST + 2 if multi else 1,
            "max_turn_tokens": COMPLETION["multi"] if multi else COMPLETION["single"],
            "max_sample_tokens": 500,
            "temperature": TEMPERATURE,
            "tools": ["calculator"] if multi else [],
        },
        "train": {"steps": steps + 1, "lr": 1e-7, "threads": threads, "tokens_per_microbatch": PASS},
        "evaluation": {"data": {"kind": "file", "path": str(data)}, "problems": 1, "every": steps + 1},
    }
    path = folder / "run.json"
    path.write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "millrace", "train", str(path)], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "step": line["step_seconds"] - line["evaluation_seconds"],
            "generate": line["rollout_seconds"],
            "publish": line["publish_seconds"],
            "train": line["train_seconds"],
        }
        for line in lines[2:]
    ]


def measure(way: str, turns: str, threads: int, steps: int, model: Path) -> Step:
    """Return the medians of the steps of a new process."""
    with tempfile.TemporaryDirectory() as folder:
        if way == "millrace":
            return medians(millrace_steps(turns, threads, steps, model, Path(folder)))
        own = [sys.executable, "-m", "benchmarks.trl_steps", "--one", way, "--turns", turns, "--steps", str(steps)]
        own += ["--threads", str(threads), "--model", str(model), "--folder", folder]
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return medians(json.loads(done.stdout.splitlines()[-1]))


def medians(steps: list[Step]) -> Step:
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


def told(way: str, step: Step, floor: float) -> str:
    """Return the line that is printed for one run. floor: the seconds of TRL's step."""
    seconds = ", ".join(f"{part} {step[part]:.2f}" for part in PARTS if part in step)
    if "cpu" in step:
        seconds += f"; CPU {step['cpu']:.2f}; {step['tokens']:.0f} tokens in {step['positions']:.0f} positions"
    return f"  {way:16} {step['step']:.2f} s ({floor / step['step']:.2f}): {seconds}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--ways", nargs="+", help="by default all; the first one is what the others are compared with")
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir(), "millrace-benchmark-trl"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        import torch

        torch.set_num_threads(given.threads[0])
        print(json.dumps(trl_steps(given.one, given.turns[0], given.steps, given.model, given.folder)))
        return
    if not (given.model / "model.safetensors").exists():
        print("teaching the model to count down ...", flush=True)
        make_model(given.model)
    for turns in given.turns:
        for threads in given.threads:
            for number in range(given.rounds):
                print(f"{turns}, {threads} thread(s), round {number + 1}, load {os.getloadavg()[0]:.1f}:", flush=True)
                floor = 0.0
                for way in given.ways or WAYS[turns]:
                    step = measure(way, turns, threads, given.steps, given.model)
                    floor = floor or step["step"]
                    print(told(way, step, floor), flush=True)


if __name__ == "__main__":
    main()
