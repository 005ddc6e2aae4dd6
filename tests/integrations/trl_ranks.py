"""Two ranks train with TRL on one fleet. Run by test_trl.py under torchrun.

Arguments: a model's folder, one for output, and `sharded` if FSDP 2 must be in use.
"""

import os
import sys

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from trl import GRPOConfig, GRPOTrainer

from millrace.errors import DataError, LaunchError, PublishError
from millrace.integrations.trl import fleet_of_ranks, use_fleet
from millrace.integrations.trl.weights import shards
from millrace.sync import Fleet, open_fleet

STEPS = 3

torch.set_num_threads(1)
model, folder, how = sys.argv[1:]
rank = int(os.environ["RANK"])


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(len(completion)) for completion in completions]


config = GRPOConfig(
    output_dir=folder,
    use_cpu=True,
    bf16=False,
    per_device_train_batch_size=4,
    num_generations=8,  # a prompt's completions are divided between the ranks
    max_completion_length=8,
    max_steps=STEPS,
    learning_rate=1e-2,
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    gradient_checkpointing=False,
    disable_tqdm=True,
    model_init_kwargs={"dtype": "float32"},
)
trainer = GRPOTrainer(
    model=model,
    args=config,
    reward_funcs=reward,
    train_dataset=Dataset.from_list([{"prompt": f"Anna has {count} apples"} for count in range(8)]),
    processing_class=AutoTokenizer.from_pretrained(model),
)

with (
    pytest.raises(LaunchError if rank else DataError, match="there is no such model folder"),
    fleet_of_ranks(lambda: open_fleet({"kind": "embedded"}, f"{folder}/none", log_dir=folder)),
):
    raise AssertionError("there is no model")

with fleet_of_ranks(lambda: open_fleet({"kind": "embedded", "threads": 1}, model, log_dir=folder)) as fleet:
    assert isinstance(fleet, Fleet) is (rank == 0)
    use_fleet(trainer, fleet)
    trainer.train()
    assert trainer.vllm_generation.version == STEPS
    assert (shards(trainer.model) is not None) is (how == "sharded")
    if rank == 0:  # rank 1 does not log
        differences = [
            entry["sampling/sampling_logp_difference/max"]
            for entry in trainer.state.log_history
            if "sampling/sampling_logp_difference/max" in entry
        ]
        assert len(differences) == STEPS
        assert max(differences) < 1e-4  # of both ranks

    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(PublishError, match="^rank 0: .*NaN" if rank else "^(?!rank).*NaN"):
        trainer.vllm_generation.sync_weights()
