"""The real TRL trains on a fleet of embedded engines: with its own tool loop, with whole conversations, and async."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from millrace.config.sources import TinyModelConfig
from millrace.errors import ConfigError, RolloutError
from millrace.imports import without_collecting
from millrace.rollout.chat import load_chat_format
from millrace.rollout.tools import Calculator
from millrace.sync import Fleet, open_fleet
from millrace.train.tiny import CALL_TEXT, make_tiny_model
from millrace.types import GenerateRequest, SamplingParams
from tests.integrations.trl_settings import ON_CPU
from tests.torchrun import ROOT, run_two_ranks

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
with without_collecting():
    from peft import LoraConfig, get_peft_model
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen3_template
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

    from millrace.integrations.trl import FleetRollout, FleetRolloutWorker, use_fleet
    from millrace.integrations.trl.version import require_trl
    from millrace.integrations.trl.weights import whole_weights

CALL = CALL_TEXT.format(clause="3 apples and 4 more", operator="+", left=3, right=4)
QUESTIONS = [f"Anna has {count} apples and buys 4 more. How many are there?" for count in (2, 3, 5, 8)]


TEXTS = [{"prompt": f"Anna has {count} apples."} for count in range(32)]


def calculator(expression: str) -> str:
    """Evaluates an expression.

    Args:
        expression: Two numbers and an operator.
    """
    left, _, right = expression.split()
    return str(int(left) + int(right))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that calls the calculator and then says the result, after a few supervised steps on that."""
    folder = tmp_path_factory.mktemp("trl") / "model"
    make_tiny_model(TinyModelConfig(kind="tiny", layers=2, hidden_size=64, heads=2, context_length=256), 0, folder)
    chat = load_chat_format(str(folder), [Calculator().schema])
    call, answered, end = chat.turn(CALL), chat.continuation(["7"]), chat.turn("#### 7")
    prompts = [chat.prompt(question) for question in QUESTIONS]
    ids = torch.tensor([[*prompt, *call, *answered, *end] for prompt in prompts])
    others = [-100] * len(prompts[0]), [-100] * len(answered)
    labels = torch.tensor([[*others[0], *call, *others[1], *end]] * len(prompts))
    torch.manual_seed(0)
    learner = AutoModelForCausalLM.from_pretrained(folder)
    optimizer, loss = torch.optim.AdamW(learner.parameters(), lr=3e-3), torch.tensor(torch.inf)
    while loss > 0.004:
        loss = learner(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learner.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with open_fleet(
        {"kind": "embedded", "threads": 1}, model, log_dir=tmp_path_factory.mktemp("logs"), restarts=1
    ) as opened:
        yield opened


class Steps(TrainerCallback):  # type: ignore[misc] # untyped
    """Remembers the fleet's version at the end of each step."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.versions = fleet, list[int | None]()

    def on_step_end(self, *_: object, **__: object) -> None:
        [state] = self.fleet.snapshot.replicas
        self.versions.append(state.version)


def digits(completions: list[Any], **_: object) -> list[float]:
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]


def trainer_of(
    model: Path, folder: Path, *, settings: Mapping[str, Any] | None = None, **arguments: Any
) -> GRPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = qwen3_template  # TRL reads tool calls by it
    own = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 64,
        "max_steps": 2,
        "learning_rate": 1e-4,
        **(settings or {}),
    }
    config = GRPOConfig(
        output_dir=str(folder),
        **ON_CPU,
        **own,
    )
    prompts = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    given = {"reward_funcs": digits, "train_dataset": Dataset.from_list(prompts), **arguments}
    return GRPOTrainer(model=str(model), args=config, processing_class=tokenizer, **given)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def on_policy(trainer: GRPOTrainer) -> bool:
    """Whether engine and trainer agree on each logprob of each step."""
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    ratios = [*logged(trainer, "sampling/importance_sampling_ratio/min")]
    ratios += logged(trainer, "sampling/importance_sampling_ratio/max")
    assert len(differences) == trainer.state.max_steps
    return max(differences) < 1e-4 and max(abs(ratio - 1) for ratio in ratios) < 1e-2


def test_each_step_is_published_once_and_generated_by_the_new_weights(
    model: Path, fleet: Fleet, tmp_path: Path
) -> None:
    steps = Steps(fleet)
    trainer = trainer_of(model, tmp_path, callbacks=[steps], settings={"gradient_accumulation_steps": 2})
    use_fleet(trainer, fleet)
    trainer.train()
    assert on_policy(trainer)
    first = steps.versions[0]
    assert first is not None
    assert steps.versions == [first, first + 1]


def test_the_reward_rises(tiny_model: Path, tmp_path: Path) -> None:
    settings = {
        "max_completion_length": 8,
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_steps": 20,
        "learning_rate": 1e-2,
    }
    trainer = trainer_of(tiny_model, tmp_path, settings=settings, train_dataset=Dataset.from_list(TEXTS))
    with open_fleet({"kind": "embedded", "threads": 1}, tiny_model, log_dir=tmp_path) as fleet:
        use_fleet(trainer, fleet)
        trainer.train()
    rewards = logged(trainer, "reward")
    assert np.mean(rewards[-3:]) > 5 * np.mean(rewards[:3])
    assert on_policy(trainer)


def test_trls_own_tools(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, tools=[calculator])
    use_fleet(trainer, fleet)
    trainer.train()
    assert min(logged(trainer, "tools/call_frequency")) > 0.5
    assert on_policy(trainer)  # on the model's tokens only: logprobs of a tool's are 0


class Shop:
    """An environment of TRL: its methods are the tools."""

    def reset(self, **_: object) -> str:
        return " Answer with a number."

    def calculator(self, expression: str) -> str:
        """Evaluates an expression.

        Args:
            expression: Two numbers and an operator.
        """
        return calculator(expression)


def test_trls_own_environments(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    trainer = trainer_of(model, tmp_path, environment_factory=Shop)
    use_fleet(trainer, fleet)
    trainer.train()
    assert on_policy(trainer)


def test_a_lora_adapter_is_published_merged(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = trainer_of(model, tmp_path, peft_config=adapter)
    use_fleet(trainer, fleet)
    trainer.train()
    assert on_policy(trainer)


def test_merged_weights_are_those_of_peft(model: Path) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), adapter)
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    published = dict(whole_weights(adapted))
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapted.named_parameters())
    merged = dict(adapted.merge_and_unload().named_parameters())
    names = {name.removeprefix("base_model.model.").replace(".base_layer", ""): name for name in published}
    assert names.keys() == merged.keys()
    for name, original in names.items():
        torch.testing.assert_close(published[original], merged[name])


def test_whole_conversations(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        given.append(columns)
        return [float(messages[-1]["content"] == "#### 7") for messages in columns["messages"]]

    rollout = FleetRollout(AutoTokenizer.from_pretrained(model), [calculator], max_turns=3)
    trainer = trainer_of(model, tmp_path, rollout_func=rollout, reward_funcs=reward)
    use_fleet(trainer, fleet)
    trainer.train()
    assert on_policy(trainer)
    [messages, *_] = [m for columns in given for m in columns["messages"] if len(m) == 3]
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant"]
    assert messages[1] == {"role": "tool", "name": "calculator", "content": "7"}
    assert {end for columns in given for end in columns["episode_end"]} <= {"answered", "turn_limit", "token_limit"}


def test_a_tools_tokens_are_masked(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rollout = FleetRollout(tokenizer, [Calculator], max_turns=3, max_turn_tokens=40)
    trainer = trainer_of(model, tmp_path, rollout_func=rollout, settings={"temperature": 0.5})
    use_fleet(trainer, fleet)
    trainer.vllm_generation.sync_weights()
    made = rollout([[{"role": "user", "content": question}] for question in QUESTIONS], trainer)
    called = 0
    for prompt, completion, mask, logprobs in zip(
        *(made[name] for name in ("prompt_ids", "completion_ids", "env_mask", "logprobs")), strict=True
    ):
        assert len(completion) == len(mask) == len(logprobs)
        assert all(value == 0 for value, own in zip(logprobs, mask, strict=True) if not own)
        answered = tokenizer.decode([token for token, own in zip(completion, mask, strict=True) if not own])
        if answered:
            called += 1
            assert answered.count("<tool_response>") == answered.count("</tool_response>") >= 1
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.5
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        own = torch.tensor(mask, dtype=torch.bool)
        torch.testing.assert_close(torch.tensor(logprobs)[own], wanted[own], atol=1e-4, rtol=0)
    assert called > 0


class Killer:
    """Kills the engine, once, as soon as it has a request."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.killed = fleet, False
        self.thread = threading.Thread(target=self._wait)

    def _wait(self) -> None:
        ends = time.monotonic() + 60
        while time.monotonic() < ends and not any(self.fleet.outstanding.values()):
            time.sleep(0.001)
        for engine in engines():
            os.kill(engine, signal.SIGKILL)
            self.killed = True


def engines() -> list[int]:
    """The processes of embedded engines below this one."""
    found, parents = [], [os.getpid()]
    while parents:
        parent = parents.pop()
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                command = Path(f"/proc/{child}/cmdline").read_text()
                parents.append(child)
                if "millrace.engines.embedded" in command and "guard.py" not in command:
                    found.append(child)
    return found


def test_an_engine_that_dies_in_a_step_does_not_end_the_run(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    rollout = FleetRollout(AutoTokenizer.from_pretrained(model), [calculator], max_turns=3)
    trainer = trainer_of(model, tmp_path, rollout_func=rollout)
    killer = Killer(fleet)
    use_fleet(trainer, fleet)
    killer.thread.start()
    trainer.train()
    killer.thread.join()
    assert killer.killed
    assert on_policy(trainer)  # so the new engine got the weights of the step


def test_the_repetition_penalty_is_passed_on(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    settings = {"repetition_penalty": 2.0, "top_k": 1, "max_completion_length": 16}
    trainer = trainer_of(model, tmp_path, settings=settings)
    use_fleet(trainer, fleet)
    generation = trainer.vllm_generation
    generation.sync_weights()
    prompt = tuple(
        trainer.processing_class.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True, return_dict=False
        )
    )
    _, [tokens], [logprobs], _ = generation.generate([prompt], None, 1)
    [with_penalty, without] = [
        fleet.generate(GenerateRequest(prompt, SamplingParams(16, top_k=1, repetition_penalty=penalty)), deadline=60.0)
        for penalty in (2.0, 1.0)
    ]
    assert tuple(tokens) == with_penalty.output_ids[: len(tokens)]
    np.testing.assert_allclose([logprob for [logprob] in logprobs], with_penalty.logprobs[: len(tokens)], atol=1e-5)
    assert not np.allclose(with_penalty.logprobs, without.logprobs, atol=1e-4)


def test_a_completion_that_fails_is_named(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    long = [{"prompt": [{"role": "user", "content": QUESTIONS[0] * 50}]}] * 8
    trainer = trainer_of(model, tmp_path, train_dataset=Dataset.from_list(long))
    use_fleet(trainer, fleet)
    with pytest.raises(RolloutError, match=r"completion \d of 8 at step 0 .*: its prompt has \d+ tokens, .* is 256"):
        trainer.train()


def test_a_rollout_needs_a_fleet_and_the_tools_for_itself(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    rollout = FleetRollout(AutoTokenizer.from_pretrained(model), [calculator])
    trainer = trainer_of(model, tmp_path, rollout_func=rollout, tools=[calculator])
    with pytest.raises(ConfigError, match="call use_fleet"):
        trainer.train()
    use_fleet(trainer, fleet)
    with pytest.raises(ConfigError, match="pass the tools to FleetRollout"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, "because of its generation_kwargs"),
        ({"vllm_structured_outputs_regex": "[0-9]"}, "because of its vllm_structured_outputs_regex"),
        ({"loss_type": "vespo"}, "loss_type vespo needs vllm_importance_sampling_mode"),
    ],
)
def test_settings_that_a_fleet_cant_honour_are_refused(
    model: Path, fleet: Fleet, tmp_path: Path, settings: Mapping[str, Any], says: str
) -> None:
    trainer = trainer_of(model, tmp_path, settings=settings)
    with pytest.raises(ConfigError, match=says):
        use_fleet(trainer, fleet)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), "only LoRA adapters"),
        (LoraConfig(r=4, target_modules=["embed_tokens"]), "tied to the head"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
def test_adapters_that_cant_be_published_are_refused(
    model: Path, fleet: Fleet, tmp_path: Path, adapter: LoraConfig, says: str
) -> None:
    trainer = trainer_of(model, tmp_path, peft_config=adapter)
    with pytest.raises(ConfigError, match=says):
        use_fleet(trainer, fleet)


def test_another_version_of_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.integrations.trl.version.version", lambda _: "1.17.0")
    with pytest.raises(ConfigError, match=r"TRL 1\.17\.0 is installed\. .* tested with 1\.16 only"):
        require_trl()


def test_the_example(tmp_path: Path) -> None:
    command = [sys.executable, "examples/trl/train.py", "2", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.fullmatch(r"reward: 0\.\d+ in the first step, 0\.\d+ in the last", done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_two_ranks(tiny_model: Path, tmp_path: Path) -> None:
    run_two_ranks("integrations/trl_ranks.py", str(tiny_model), str(tmp_path))


class OnTheCPU:
    """FlashAttention 3, which TRL's trainer asks for: the same result, by torch."""

    @staticmethod
    def flash_attn_varlen_func(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Any, ends: Any, *_: int, **options: Any
    ) -> torch.Tensor:
        out, starts, ends = torch.empty_like(query), starts.tolist(), ends.tolist()
        for a, b, c, d in zip(starts, starts[1:], ends, ends[1:], strict=False):
            q, k, v = (part.transpose(0, 1)[None] for part in (query[a:b], key[c:d], value[c:d]))
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            scale = options["softmax_scale"]
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            out[a:b] = attended[0].transpose(0, 1)
        return out


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's async trainer is for GPUs: these two things it takes from them."""
    monkeypatch.setattr(packing, "_flash_attn", lambda: OnTheCPU)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: 1e11)


def train_async(
    model: Path,
    fleet: Fleet,
    folder: Path,
    reward: Callable[..., Any],
    questions: Sequence[str] = QUESTIONS,
    stale_after: float = 60.0,
) -> AsyncGRPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = AsyncGRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=64,
        max_steps=3,
        learning_rate=1e-4,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_staleness=2,
        heartbeat_stale_after_s=stale_after,
    )
    prompts = [[{"role": "user", "content": text}] for text in questions]
    rows = Dataset.from_list([{"prompt": prompt, "answer": "#### 7"} for prompt in prompts])
    worker = FleetRolloutWorker(fleet, config, rows, tokenizer, reward, [calculator], max_turns=3)
    trainer = AsyncGRPOTrainer(
        model=str(model),
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        rollout_worker=worker,
        weight_transfer=worker.weights,
    )
    assert config.token_budget == fleet.context_length
    try:
        trainer.train()
    finally:
        assert not [thread for thread in threading.enumerate() if thread.name == "millrace-trl-rollouts"]
        assert not any(fleet.outstanding.values())
    return trainer


@pytest.mark.usefixtures("on_the_cpu")
def test_the_async_trainer(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    async def reward(completions: list[Any], answer: list[str], **_: object) -> list[float | None]:
        return [float(messages[-1]["content"] == right) for messages, right in zip(completions, answer, strict=True)]

    trainer = train_async(model, fleet, tmp_path, reward)
    assert len(logged(trainer, "reward")) == 3
    assert max(logged(trainer, "sample/staleness_max")) <= 2
    assert min(logged(trainer, "sample/staleness_mean")) >= 0
    assert all(abs(ratio - 1) < 0.05 for ratio in logged(trainer, "ratio"))
    assert max(logged(trainer, "rollout/turns_mean")) > 1
    [state] = fleet.snapshot.replicas
    assert trainer.model_version == trainer.rollout_worker.weights.published == 4
    assert trainer.rollout_worker.weights.model_version(state.version) == 4


@pytest.mark.usefixtures("on_the_cpu")
def test_a_reward_that_raises_ends_the_async_trainer(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    def reward(**_: object) -> list[float]:
        raise KeyError("gold")

    with pytest.raises(RolloutError, match="the rollouts have ended: 'gold'") as raised:
        train_async(model, fleet, tmp_path, reward)
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_group_that_fails_is_dropped_and_counted(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    trainer = train_async(model, fleet, tmp_path, digits, questions=[QUESTIONS[0] * 50, *QUESTIONS])
    assert len(logged(trainer, "reward")) == 3
    assert sum(logged(trainer, "rollout/dropped_groups_total")) >= 1


@pytest.mark.usefixtures("on_the_cpu")
def test_groups_that_all_fail_end_the_async_trainer(model: Path, fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"all groups of the last 1 s failed .*: sample .*: its prompt has"):
        train_async(model, fleet, tmp_path, digits, questions=[QUESTIONS[0] * 50], stale_after=1.0)
