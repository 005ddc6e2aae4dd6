"""Runs verl's own trainer, `python -m verl.trainer.main_ppo`, on the CPU with rollout.name=millrace."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas

from millrace.rollout.problems import make_story

HERE = Path(__file__).parent
ROLLOUT = "actor_rollout_ref.rollout"
ACTOR = "actor_rollout_ref.actor"
DEADLINE = 1500.0  # seconds for a run: each of a dozen processes imports torch, transformers and ray


@dataclass(frozen=True)
class Run:
    """What a run of main_ppo did. steps: the metrics of each step. log: what its processes wrote. returned: its exit
    status. generations: the samples of each step."""

    steps: Sequence[Mapping[str, float]]
    log: str
    returned: int
    generations: Mapping[int, Sequence[Mapping[str, object]]]

    def published(self, fleet: str) -> list[tuple[int, int]]:
        """The versions that were published to the fleet, with their steps, in order."""
        found = re.findall(rf"{fleet} version (\d+) has the weights of step (\d+)", self.log)
        return [(int(version), int(step)) for version, step in found]


def train(model: Path, folder: Path, *overrides: str, steps: int = 3, ranks: int = 1, gpus: int | None = None) -> Run:
    """Train for some steps. `gpus` is the number of GPUs that Ray is told of, by default one for each rank."""
    data = _data(folder / "data.parquet")
    metrics, samples = folder / "metrics.jsonl", folder / "samples"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *_settings(model, data, samples, steps, ranks)]
    command += [f"+ray_kwargs.ray_init.num_gpus={ranks if gpus is None else gpus}", *overrides]
    returned, text = _run(command, folder, _environment(metrics))
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    generations = {
        int(path.stem): [json.loads(line) for line in path.read_text().splitlines()] for path in samples.glob("*.jsonl")
    }
    return Run([json.loads(line)["data"] for line in lines], text, returned, generations)


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Run a command, and return its exit status and what it wrote."""
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            returned = process.wait(DEADLINE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        log.seek(0)
        return returned, log.read()


def _environment(metrics: Path) -> Mapping[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # the device that verl's engines are registered for
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "VERL_LOGGING_LEVEL": "WARN",  # below, verl itself fails in separate_async without hybrid replicas
        "MILLRACE_LOGGING_LEVEL": "INFO",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HYDRA_FULL_ERROR": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # a busy machine is not out of memory
    }


def _settings(model: Path, data: Path, samples: Path, steps: int, ranks: int) -> list[str]:
    """Return the settings of a small GRPO run. verl computes in float32, so that its logprobs are the engines'."""
    precision = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
    return [
        "trainer.device=cpu", f"trainer.n_gpus_per_node={ranks}", f"trainer.total_training_steps={steps}",
        "trainer.logger=[file]", "trainer.val_before_train=False", "trainer.test_freq=-1", "trainer.save_freq=-1",
        "trainer.resume_mode=disable", f"trainer.rollout_data_dir={samples}",
        "ray_kwargs.ray_init.num_cpus=16", "+ray_kwargs.ray_init.include_dashboard=False",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "algorithm.adv_estimator=grpo", f"data.train_files={data}", f"data.val_files={data}",
        "data.train_batch_size=4", "data.max_prompt_length=100", "data.max_response_length=16",
        "data.dataloader_num_workers=0",
        f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.model.use_remove_padding=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"{ACTOR}.optim.lr=1e-2", f"{ACTOR}.ppo_mini_batch_size=4", f"{ACTOR}.ppo_micro_batch_size_per_gpu=8",
        f"{ACTOR}.use_torch_compile=False", f"{ACTOR}.fsdp_config.use_torch_compile=False",
        f"{ACTOR}.fsdp_config.model_dtype=float32", f"+{ACTOR}.fsdp_config.mixed_precision={precision}",
        f"{ROLLOUT}.name=millrace", f"{ROLLOUT}.tensor_model_parallel_size=1", f"{ROLLOUT}.n=4",
        f"{ROLLOUT}.dtype=float32", f"{ROLLOUT}.max_model_len=256", f"{ROLLOUT}.calculate_log_probs=True",
        f"{ROLLOUT}.agent.num_workers=1", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=8",
        f"+{ROLLOUT}.custom.engine.kind=embedded", f"+{ROLLOUT}.custom.engine.threads=1",
        f"+{ROLLOUT}.custom.engine.start_timeout=300",
        f"reward.custom_reward_function.path={HERE / 'reward.py'}", "reward.num_workers=1",
    ]  # fmt: skip


def _data(path: Path) -> Path:
    """Write word problems in verl's form."""
    stories = [make_story(1, index) for index in range(64)]
    rows = [
        {
            "data_source": "millrace",
            "prompt": [{"role": "user", "content": story.question}],
            "reward_model": {"style": "rule", "ground_truth": str(story.results()[-1])},
            "extra_info": {"index": index},
        }
        for index, story in enumerate(stories)
    ]
    pandas.DataFrame(rows).to_parquet(path)
    return path
