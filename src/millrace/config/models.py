"""The settings of a run, as pydantic models.

An unknown key is an error. A setting is honoured or refused, never ignored. The docstring below a setting is its
description, which `millrace config` prints.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from millrace.config.agents import AgentConfig, check_agent
from millrace.config.base import Model
from millrace.config.engines import EngineConfig
from millrace.config.gateway import GatewayConfig
from millrace.config.judging import TEMPLATE, VERDICT, check_template, check_verdict
from millrace.config.paths import LocalPath, PathOrName
from millrace.config.routers import RouterConfig, check_router
from millrace.config.sources import DataConfig, ModelConfig, TasksDataConfig
from millrace.config.tasks import (
    EnvironmentConfig,
    RewardConfigs,
    ToolConfig,
    check_environment,
)
from millrace.config.tracking import TracingConfig, Trackers, TrackersConfig

NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


TURNS = 4  # of a sample without an agent, by default


class RolloutConfig(Model):
    """How rollouts are sampled."""

    groups_per_step: PositiveInt
    """Number of groups (problems) that one step trains on."""
    samples_per_group: Annotated[int, Field(ge=2)]
    """Number of samples for each problem."""
    max_turns: PositiveInt | None = None
    """Maximum number of turns in one sample. None is 4, and with `agent:` no limit: an agent's turns include those of
    its sub-agents, and it decides itself when it is done."""
    max_turn_tokens: PositiveInt
    """Maximum number of tokens in one turn."""
    max_sample_tokens: PositiveInt
    """Maximum number of tokens in one sample: prompt, turns and tool results together."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample from the most likely tokens whose probabilities add up to top_p. 1 is off."""
    top_k: int = -1
    """Sample from the k most likely tokens. -1 is off."""
    min_p: Probability = 0.0
    """Leave out tokens whose probability is below min_p x that of the most likely token. 0 is off."""
    tools: tuple[ToolConfig, ...] | None = None
    """The tools that the model may call. None is the calculator, or no tool if there is an environment."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the model's chat template, such as `{enable_thinking: false}`. They apply to every prompt
    and every turn."""
    sample_timeout: PositiveFloat = 300.0
    """Seconds for one sample, including all its turns and retries."""
    sample_retries: Annotated[int, Field(ge=0)] = 2
    """Maximum number of retries of a sample whose engine died."""
    partial_rollouts: bool = True
    """A retried sample keeps the tokens that it has. Otherwise it starts again from the prompt."""
    max_staleness: Annotated[int, Field(ge=0)] = 1
    """Maximum number of versions by which a sample may be older than the weights that it trains. Mode hybrid is
    on-policy (0) unless it recycles."""
    over_sampling: Annotated[int, Field(ge=0)] = 0
    """Number of groups started in addition to groups_per_step. The step trains on the groups that finish first."""
    recycle: bool = False
    """In mode hybrid, samples that are unfinished at the end of a step continue in the next step. Otherwise they are
    aborted."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """Maximum number of groups that a step replaces because all samples of the group have the same reward (DAPO,
    arXiv:2503.14476)."""


class JudgeConfig(Model):
    """A frozen model that grades the answers, and its engines (docs/judges.md)."""

    model: ModelConfig
    """The judge's model."""
    engine: EngineConfig
    """The judge's engines."""
    mode: Literal["colocated", "standalone"] = "standalone"
    """`colocated` shares the devices of the policy's engines and takes turns with them. `standalone` has its own
    devices."""
    seed: int = 0
    """Seed of a tiny model's weights."""
    template: Annotated[str, AfterValidator(check_template)] = TEMPLATE
    """The judge's prompt. It may use {question}, {answer} (the model's last turn) and {reference}."""
    verdict: Annotated[str, AfterValidator(check_verdict)] = VERDICT
    """Regular expression with one group, which matches the grade. The last match in the judge's answer counts."""
    best: PositiveFloat = 10.0
    """The grade that becomes reward 1. Grade 0 becomes reward 0. A number outside of 0 to `best` is not a grade."""
    max_new_tokens: PositiveInt = 512
    """Maximum number of tokens in the judge's answer."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the grade in the reward: reward = weight x grade + (1 - weight) x the reward of `reward`."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a row Millrace restarts an engine that died or hangs."""


class OptimizerConfig(Model):
    """AdamW, with a linear warm-up to `lr` followed by the schedule `lr_schedule`."""

    lr: PositiveFloat
    """Learning rate after the warm-up."""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """AdamW's betas."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum norm of the gradients. Larger ones are clipped to it."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Schedule of the learning rate after the warm-up."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps of the linear warm-up."""
    min_lr_ratio: Probability = 0.0
    """Final learning rate of the schedule, as a share of `lr`."""


class LossConfig(Model):
    """The GRPO loss (DeepSeekMath, arXiv:2402.03300) and its common variants."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clipping bound of the ratio: 1 - clip_low."""
    clip_high: PositiveFloat = 0.28
    """Upper clipping bound of the ratio: 1 + clip_high. A value above clip_low is DAPO's clip-higher
    (arXiv:2503.14476)."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL term. If it is above 0, a frozen copy of the initial weights is kept as the reference."""
    average: Literal["token", "sequence"] = "token"
    """Whether the loss is averaged over tokens or over sequences."""
    normalize_advantages: bool = True
    """Divide advantages by the group's standard deviation. False is Dr. GRPO (arXiv:2503.20783)."""
    importance_cap: PositiveFloat | None = 2.0
    """Cap of the truncated importance weight, which corrects for the engine's logprobs. None is off."""


class WarmupConfig(OptimizerConfig):
    """Supervised training before reinforcement learning, for a model with random weights.

    It teaches the format of an answer on generated problems (`millrace.train.warmup_data`).
    """

    steps: PositiveInt
    """Number of supervised steps."""
    batch_size: PositiveInt = 32
    """Number of conversations in one step."""
    seed: int = 0
    """Seed of the endless stream of conversations."""


class TrainConfig(OptimizerConfig):
    """Reinforcement learning. The optimizer's settings are part of this section, such as `train.lr`."""

    steps: PositiveInt
    """Number of training steps in the run."""
    loss: LossConfig = LossConfig()
    """The GRPO loss."""
    minibatches: PositiveInt = 1
    """Number of optimizer steps on the samples of one training step."""
    tokens_per_microbatch: PositiveInt = 8192
    """Maximum number of tokens in one forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the forward pass. The master weights are float32."""
    device: str = "cpu"
    """The torch device: `cpu`, `cuda` or `cuda:N`."""
    threads: PositiveInt | Literal["auto"] = "auto"
    """Number of CPU threads that torch uses. `auto` uses all cores in hybrid mode, when the engines sleep, and those
    that the engines leave free in standalone mode. If OMP_NUM_THREADS is set, `auto` keeps it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""


class EvaluationConfig(Model):
    """Evaluation on held-out problems, with greedy decoding."""

    data: DataConfig
    """The held-out problems."""
    every: PositiveInt = 5
    """Number of steps between two evaluations. The first and the last step are always evaluated."""
    problems: PositiveInt = 128
    """Number of problems that are evaluated."""


class CheckpointConfig(Model):
    """When the trainer's state is saved."""

    every: PositiveInt = 10
    """Number of steps between two checkpoints. The last step is always saved."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep."""


TransportName = Literal["auto", "shm", "cuda_ipc", "gloo", "nccl", "disk", "delta", "ucx"]


class PublishConfig(Model):
    """How new weights reach the engines."""

    transport: TransportName = "auto"
    """How weights travel to the engines. `auto` chooses by the devices and hosts that engines and trainer share."""
    folder: PathOrName | None = None
    """Where versions are stored: a path, or a URL for fsspec. With transport disk, the engines read it too."""
    keep: PositiveInt = 2
    """Number of versions to keep."""
    sidecars: tuple[str, ...] = ()
    """For delta and ucx: the URL of `millrace sidecar` on each host with engines."""
    bucket_bytes: PositiveInt = 256 * 1024 * 1024
    """Size of one bucket of tensors, in bytes."""
    timeout: PositiveFloat = 120.0
    """Seconds for the whole publish, on all engines together."""
    require_finite: bool = True
    """Refuse to publish weights that contain NaN or infinite values."""

    @model_validator(mode="after")
    def _check(self) -> "PublishConfig":
        if self.transport in ("disk", "delta") and self.folder is None:
            raise ValueError(f"publish.transport {self.transport} needs publish.folder, which is not set")
        if self.sidecars and self.transport not in ("auto", "delta", "ucx"):
            raise ValueError(f"publish.sidecars are for publish.transport delta or ucx, and it is {self.transport}")
        if self.sidecars and self.transport == "auto" and self.folder is not None:
            raise ValueError(
                "publish.sidecars can copy versions from publish.folder (delta), or read buckets from the trainer's "
                "memory (ucx); set publish.transport to one of the two"
            )
        if self.transport == "ucx" and not self.sidecars:
            raise ValueError(
                "publish.transport ucx needs publish.sidecars, the URL of a `millrace sidecar` on each host"
            )
        return self


class MetricsConfig(Model):
    """The metrics server, which has the page of the run at `/`, and shows the state of its engines to Prometheus and
    `millrace status`.

    It is read-only and asks for no key: every client that reaches the port can read the metrics, and the samples.
    """

    host: str = "127.0.0.1"
    """Address that the metrics server listens on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port that the metrics server listens on. 0 picks a free port."""


class RunConfig(Model):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run, and of its folder in output_dir."""
    output_dir: LocalPath = Path("runs")
    """Folder that holds the folders of all runs."""
    seed: int = 0
    """Seed of everything random in the run."""
    mode: Literal["hybrid", "standalone"] = "hybrid"
    """`hybrid`: engines and trainer share their devices and take turns. `standalone`: both work at the same time."""
    model: ModelConfig
    """The model to train."""
    engine: EngineConfig
    """The engines that generate."""
    data: DataConfig
    """The training problems."""
    reward: RewardConfigs | None = None
    """The functions whose weighted sum is the reward: one, or a list. None is the rule for GSM8K's answers,
    `millrace.rollout.reward:gsm8k`."""
    environment: EnvironmentConfig | None = None
    """A class that plays with the model and gives the reward, in place of tools and `reward`."""
    agent: AgentConfig | None = None
    """An agent that talks to the gateway, in place of tools: a command for each sample, or a function."""
    gateway: GatewayConfig | None = None
    """The gateway for `agent`. None is one with the default settings."""
    rollout: RolloutConfig
    """How rollouts are sampled."""
    warmup: WarmupConfig | None = None
    """Supervised training before reinforcement learning. None is off."""
    train: TrainConfig
    """Reinforcement learning."""
    evaluation: EvaluationConfig
    """Evaluation on held-out problems."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved."""
    publish: PublishConfig = PublishConfig()
    """How new weights reach the engines."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a row Millrace restarts an engine that died or hangs."""
    router: RouterConfig | None = None
    """An external router between the requests and the engines: a section, or just the kind, as in `router: sglang`.
    None sends requests straight to the engines."""
    judges: JudgeConfig | None = None
    """A model that grades the answers. None uses only the functions of `reward`."""
    metrics: MetricsConfig | None = MetricsConfig()
    """The page of the run, and metrics for Prometheus and `millrace status`. None is off."""
    trackers: Trackers = TrackersConfig()
    """Experiment trackers: a section, or a list, as in `trackers: [tensorboard, wandb]`."""
    tracing: TracingConfig | None = None
    """Traces of samples and publishes by OpenTelemetry. None is off; `tracing: {}` is on with the default settings."""

    @property
    def max_turns(self) -> int | None:
        """The turns of the model in one sample; None is no limit."""
        return self.rollout.max_turns or (TURNS if self.agent is None else None)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        rollout = self.rollout
        if rollout.max_turn_tokens > rollout.max_sample_tokens:
            raise ValueError("rollout.max_turn_tokens is above rollout.max_sample_tokens; no turn could be that long")
        if self.router is not None:
            check_router(self.router, self.engine)
        if rollout.recycle:
            if self.mode != "hybrid":
                raise ValueError(
                    "rollout.recycle is for mode hybrid; in mode standalone, samples continue while the trainer works"
                )
            if not (rollout.over_sampling and rollout.partial_rollouts and rollout.max_staleness):
                raise ValueError(
                    "rollout.recycle keeps the samples that over-sampling leaves unfinished; it needs "
                    "rollout.over_sampling, rollout.partial_rollouts and a rollout.max_staleness of at least 1"
                )
        if self.environment is not None:
            check_environment(
                {
                    "reward": self.reward,
                    "rollout.tools": rollout.tools,
                    "judges": self.judges,
                    "warmup": self.warmup,
                    "data.prompt": getattr(self.data, "prompt", None),
                    "evaluation.data.prompt": getattr(self.evaluation.data, "prompt", None),
                    "data.images": getattr(self.data, "images", None),
                    "evaluation.data.images": getattr(self.evaluation.data, "images", None),
                }
            )
        check_agent(self)
        has_tasks = self.environment is not None and self.environment.verifiers is not None
        for setting, data in (("data", self.data), ("evaluation.data", self.evaluation.data)):
            if isinstance(data, TasksDataConfig) is not has_tasks:
                raise ValueError(f"{setting}.kind tasks and environment.verifiers need each other; set both or none")
        if self.judges is not None and self.judges.mode == "colocated":
            if self.mode != "hybrid":
                raise ValueError(
                    "judges.mode colocated needs engines that sleep between the steps, which they do only in mode "
                    "hybrid; in mode standalone, set judges.mode standalone to give the judges their own devices"
                )
            if rollout.dynamic_sampling:
                raise ValueError(
                    "rollout.dynamic_sampling needs the rewards during generation, and judges of mode colocated grade "
                    "after it; set judges.mode standalone"
                )
        return self
