"""TRL's GRPOTrainer on a Millrace fleet, on two CPU cores: a tiny model from random weights learns to write digits.

pip install 'millrace[trl]'
python examples/trl/train.py [STEPS] [FOLDER]
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from millrace import TinyModelConfig
from millrace.integrations.trl import use_fleet
from millrace.sync import open_fleet
from millrace.train import make_tiny_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 30
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/trl")
torch.set_num_threads(1)
make_tiny_model(TinyModelConfig(kind="tiny", hidden_size=64, heads=2), 0, folder / "model")


def share_of_digits(completions: list[str], **_: object) -> list[float]:
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in completions]


trainer = GRPOTrainer(
    model=str(folder / "model"),
    processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    reward_funcs=share_of_digits,
    train_dataset=Dataset.from_list([{"prompt": f"Anna has {count} apples."} for count in range(64)]),
    args=GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=12,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    ),
)
engines = {"kind": "embedded", "threads": 1, "replicas": 2}
with open_fleet(engines, folder / "model", log_dir=folder / "logs") as fleet:
    use_fleet(trainer, fleet)
    trainer.train()
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"reward: {rewards[0]:.3f} in the first step, {rewards[-1]:.3f} in the last")
