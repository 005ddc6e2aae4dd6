"""Two ranks train with TRL on one fleet. Run by test_trl.py under torchrun, with a model's folder and an empty one."""

import os
import sys

import pytest
import torch
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from trl import GRPOConfig, GRPOTrainer

from millrace.errors import DataError, LaunchError, PublishError
from millrace.integrations.trl import fleet_of_ranks, use_fleet
from millrace.integrations.trl.weights import shards
from millrace.sync import Fleet, open_fleet
from tests.integrations.trl_settings import ON_CPU

STEPS = 3

torch.set_num_threads(1)
model, folder = sys.argv[1:]
rank = int(os.environ["RANK"])


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(len(completion)) for completion in completions]


config = GRPOConfig(
    output_dir=folder,
    **ON_CPU,
    per_device_train_batch_size=4,
    num_generations=8,  # a prompt's completions are divided between the ranks
    max_completion_length=8,
    max_steps=STEPS,
    learning_rate=1e-2,
)
trainer = GRPOTrainer(
    model=model,
    args=config,
    reward_funcs=reward,
    train_dataset=Dataset.from_list([{"prompt": f"Anna has {count} apples"} for count in range(8)]),
    processing_class=AutoTokenizer.from_pretrained(model),
)

with (
    pytest.raises(LaunchError if rank else DataError, match="none has no .*safetensors file"),
    fleet_of_ranks(lambda: open_fleet({"kind": "embedded"}, f"{folder}/none", log_dir=folder)),
):
    raise AssertionError("there is no model")

with fleet_of_ranks(lambda: open_fleet({"kind": "embedded", "threads": 1}, model, log_dir=folder)) as fleet:
    assert isinstance(fleet, Fleet) is (rank == 0)
    use_fleet(trainer, fleet, tokens_per_pass=16)
    trainer.train()
    assert trainer.vllm_generation.version == STEPS
    if rank == 0:  # rank 1 does not log
        differences = [
            entry["sampling/sampling_logp_difference/max"]
            for entry in trainer.state.log_history
            if "sampling/sampling_logp_difference/max" in entry
        ]
        assert len(differences) == STEPS
        assert max(differences) < 1e-4  # of both ranks

    # FSDP 2, which accelerate does not use on the CPU.
    trainer.model, whole = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    for layer in trainer.model.model.layers:
        fully_shard(layer)
    fully_shard(trainer.model)
    assert shards(trainer.model) is not None
    trainer.vllm_generation.sync_weights()
    assert trainer.vllm_generation.version == STEPS + 1
    prompt = [3, 5, 8]
    _, [made], [logprobs], _ = trainer.vllm_generation.generate([prompt], None, 1)
    with torch.no_grad():
        logits = whole(input_ids=torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(made)[:, None])
    torch.testing.assert_close(torch.tensor(logprobs), wanted, atol=1e-4, rtol=0)

    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(PublishError, match="^rank 0: .*NaN" if rank else "^(?!rank).*NaN"):
        trainer.vllm_generation.sync_weights()
