"""What TRL's trainers have in common in the tests: on the CPU, without checkpoints and reports."""

from typing import Any

ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "model_init_kwargs": {"dtype": "float32"},
}
