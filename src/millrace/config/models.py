"""The settings of a run, as pydantic models.

An unknown key is an error. A setting is honoured or refused, never ignored. The docstring below a setting is its
description, which `millrace config` prints.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from millrace.config.base import Flag, ForeignArgument, Model
from millrace.config.judging import TEMPLATE, VERDICT, check_template, check_verdict
from millrace.config.paths import LocalPath, PathOrName
from millrace.config.routers import RouterConfig, check_router

EngineArgument = ForeignArgument
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class TinyModelConfig(Model):
    """A small Qwen3 model with a word-level vocabulary and random weights, made from the run's seed. It is for demos
    and tests."""

    kind: Literal["tiny"]
    """A model with random weights."""
    layers: PositiveInt = 2
    """Transformer layers."""
    hidden_size: PositiveInt = 128
    """Width of the hidden states."""
    heads: PositiveInt = 4
    """Attention heads."""
    context_length: PositiveInt = 256
    """Longest sequence, in tokens."""


class PretrainedModelConfig(Model):
    """A pretrained model with its tokenizer, in Hugging Face's format: a local folder, or a name on the Hub."""

    kind: Literal["pretrained"]
    """A pretrained model."""
    path: PathOrName
    """The model's folder, or its name on the Hugging Face Hub."""


ModelConfig = Annotated[TinyModelConfig | PretrainedModelConfig, Field(discriminator="kind")]


class GeneratedDataConfig(Model):
    """Word problems in GSM8K's format, made by a seeded generator (`millrace.rollout.problems`)."""

    kind: Literal["generated"]
    """Generated problems."""
    seed: int
    """Seed of the generator. The same seed gives the same problems."""
    problems: PositiveInt
    """Number of problems."""


class FileDataConfig(Model):
    """A JSONL file in GSM8K's format: each line has a `question`, and an `answer` that ends in `#### n`."""

    kind: Literal["file"]
    """A JSONL file."""
    path: LocalPath
    """Path of the file."""


class HubDataConfig(Model):
    """A data set on the Hugging Face Hub, in GSM8K's format. It needs the extra `millrace[hub]`."""

    kind: Literal["hub"]
    """A data set on the Hub."""
    path: PathOrName
    """Name of the data set, such as `openai/gsm8k`, or a folder that the library `datasets` can load."""
    name: str | None = None
    """Configuration of the data set, such as `main`."""
    split: str
    """Split of the data set, such as `train`."""


DataConfig = Annotated[GeneratedDataConfig | FileDataConfig | HubDataConfig, Field(discriminator="kind")]


class ReplicatedConfig(Model):
    """The settings that all kinds of engines share."""

    replicas: PositiveInt = 1
    """Number of servers. Each has the whole model."""
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Flag("sglang", "--dtype"), Flag("vllm", "--dtype")
    ] = "auto"
    """Dtype of the engine's weights and computation. `auto` uses the dtype of the model's folder, except that SGLang
    and vLLM on a GPU serve a float32 folder in bfloat16."""
    max_running_requests: Annotated[
        PositiveInt, Flag("sglang", "--max-running-requests"), Flag("vllm", "--max-num-seqs")
    ] = 64
    """Requests that one server runs at the same time. Further requests wait in its queue."""
    threads: PositiveInt | None = None
    """Number of CPU threads that torch uses. None keeps torch's default."""
    host: Annotated[str, Flag("sglang", "--host", passed=False), Flag("vllm", "--host", passed=False)] = "127.0.0.1"
    """Address that the servers listen on."""
    ports: Annotated[
        tuple[PositiveInt, ...] | None, Flag("sglang", "--port", passed=False), Flag("vllm", "--port", passed=False)
    ] = None
    """One port for each replica. None picks free ports."""
    urls: tuple[str, ...] | None = None
    """Running servers to attach to, one for each replica. Their keys come from MILLRACE_ENGINE_API_KEY and
    MILLRACE_ENGINE_ADMIN_API_KEY."""
    start_timeout: PositiveFloat = 60.0
    """Seconds until a server must be healthy."""

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        if self.urls is not None and len(self.urls) != self.replicas:
            raise ValueError(
                f"urls names {len(self.urls)} servers for {self.replicas} replicas; set replicas to {len(self.urls)}"
            )
        if self.ports is not None and len(self.ports) != self.replicas:
            raise ValueError(
                f"ports names {len(self.ports)} ports for {self.replicas} replicas; give each a port, or leave it out"
            )
        return self


class EmbeddedEngineConfig(ReplicatedConfig):
    """Millrace's own engine. It serves any causal language model of transformers, on the CPU or one GPU."""

    kind: Literal["embedded"]
    """Millrace's own engine."""
    device: str = "cpu"
    """The torch device: `cpu`, `cuda` or `cuda:N`."""
    cached_prefixes: Annotated[int, Field(ge=0)] = 64
    """Number of prompt prefixes that the KV cache keeps. 0 turns the prefix cache off."""
    context_length: PositiveInt | None = None
    """Longest sequence, in tokens of prompt and output. None uses the model's context length."""
    faults: bool = False
    """For tests: the engine crashes, hangs or refuses requests on demand."""


class StockEngineConfig(ReplicatedConfig):
    """The settings that SGLang and vLLM share.

    Millrace starts a stock engine from the environment that `millrace engines install` made, or with the interpreter
    `python`. With `urls` it attaches to running servers instead.
    """

    version: str
    """Version of the engine. It selects the environment that `millrace engines install` made."""
    device: Annotated[Literal["cuda", "cpu"], Flag("sglang", "--device")] = "cuda"
    """Device that the engine runs on."""
    python: LocalPath | None = None
    """A Python interpreter with the engine installed. None uses the environment that `millrace engines install`
    made."""
    tp_size: Annotated[
        PositiveInt,
        Flag("sglang", "--tp-size", "--tensor-parallel-size"),
        Flag("vllm", "--tensor-parallel-size", "--tp"),
    ] = 1
    """Number of tensor-parallel ranks."""
    pp_size: Annotated[
        PositiveInt,
        Flag("sglang", "--pp-size", "--pipeline-parallel-size"),
        Flag("vllm", "--pipeline-parallel-size", "--pp"),
    ] = 1
    """Number of pipeline-parallel stages."""
    dp_size: Annotated[
        PositiveInt, Flag("sglang", "--dp-size", "--data-parallel-size"), Flag("vllm", "--data-parallel-size", "--dp")
    ] = 1
    """Number of data-parallel ranks."""
    ep_size: Annotated[
        PositiveInt,
        Flag("sglang", "--ep-size", "--ep", "--expert-parallel-size"),
        Flag("vllm", "--enable-expert-parallel", passed=False),
    ] = 1
    """Number of expert-parallel ranks."""
    nnodes: Annotated[
        PositiveInt, Flag("sglang", "--nnodes"), Flag("vllm", "--nnodes", "--data-parallel-size-local", passed=False)
    ] = 1
    """Number of nodes that one engine runs on."""
    node_rank: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Flag("sglang", "--node-rank", passed=False),
        Flag("vllm", "--node-rank", "--data-parallel-start-rank", "--headless", passed=False),
    ] = None
    """Rank of this host's node. None runs all nodes on this host."""
    dist_init_addr: Annotated[
        Annotated[str, Field(pattern=r"^.+:\d+$")] | None,
        Flag("sglang", "--dist-init-addr", "--nccl-init-addr", passed=False),
        Flag("vllm", "--master-addr", "--master-port", "--data-parallel-address", passed=False),
    ] = None
    """host:port of node 0. None picks a free port if all nodes run on this host."""
    base_gpu_id: Annotated[int, Field(ge=0), Flag("sglang", "--base-gpu-id", passed=False)] = 0
    """Index of the first GPU. Replica r starts at base_gpu_id + r x the GPUs of one replica."""
    cuda_visible_devices: Annotated[str | None, Flag("vllm", "--device-ids", passed=False)] = None
    """CUDA_VISIBLE_DEVICES of the servers. None keeps this process's value."""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Flag("sglang", "--log-level"),
        Flag("vllm", "--log-level", passed=False),
    ] = "info"
    """Level of the servers' logs."""
    kv_events: bool = False
    """Route by the KV cache events that the engine publishes. They report the prefixes in its cache. It needs the extra
    `millrace[kv-events]`."""
    start_timeout: PositiveFloat = 600.0
    """Seconds until a server must be healthy. A large model on a slow disk takes minutes, a small one on the CPU 20 to
    60 s."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables that are added for the servers."""
    engine_args: dict[str, EngineArgument] = Field(default_factory=dict)
    """Further arguments of the engine, by the engine's names for them. A dictionary becomes JSON."""

    @model_validator(mode="after")
    def _check_servers(self) -> Self:
        if self.urls is not None and self.python is not None:
            raise ValueError("urls attaches to running servers and python launches new ones; give one of them")
        if self.node_rank is not None and self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank {self.node_rank} is not below nnodes {self.nnodes}")
        if self.node_rank is not None and self.nnodes > 1 and self.dist_init_addr is None:
            raise ValueError("an engine on several hosts needs dist_init_addr (host:port of node 0); it is missing")
        if self.nnodes > 1 and self.replicas > 1:
            raise ValueError("an engine over several nodes is launched alone; set replicas to 1")
        if self.kv_events and self.urls is not None:
            raise ValueError(
                "kv_events is for engines that Millrace launches; it is not known where an engine at urls publishes "
                "its events"
            )
        if self.kv_events and self.dp_size > 1:
            raise ValueError(
                f"kv_events is for engines with one KV cache, and with dp_size {self.dp_size} each rank has its own; "
                "set replicas instead, or leave kv_events out"
            )
        return self


class SGLangEngineConfig(StockEngineConfig):
    """Stock SGLang."""

    kind: Literal["sglang"]
    """Stock SGLang."""
    version: str = "0.5.23"
    """Version of SGLang."""
    max_total_tokens: Annotated[PositiveInt | None, Flag("sglang", "--max-total-tokens", passed=False)] = None
    """Capacity of the KV cache, in tokens. None keeps SGLang's default on a GPU, and is 65536 on the CPU."""
    mem_fraction_static: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None, Flag("sglang", "--mem-fraction-static")
    ] = None
    """Share of the GPU's memory for weights and KV cache. None keeps SGLang's default."""
    memory_saver: Annotated[bool, Flag("sglang", "--enable-memory-saver", passed=False)] = True
    """Release GPU memory when the engine sleeps. It has no effect on the CPU."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.tp_size * self.pp_size % self.nnodes:
            raise ValueError(f"tp_size {self.tp_size} x pp_size {self.pp_size} can't be split over {self.nnodes} nodes")
        return self


class VLLMEngineConfig(StockEngineConfig):
    """Stock vLLM."""

    kind: Literal["vllm"]
    """Stock vLLM."""
    version: str = "0.32.0"
    """Version of vLLM."""
    api_servers: Annotated[PositiveInt, Flag("vllm", "--api-server-count", passed=False)] = 1
    """Number of processes that serve HTTP on the same port."""
    gpu_memory_utilization: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None,
        Flag("vllm", "--gpu-memory-utilization", "--device-memory-utilization"),
    ] = None
    """Share of the GPU's memory that vLLM uses. None keeps vLLM's default."""
    kv_cache_memory_bytes: Annotated[PositiveInt | None, Flag("vllm", "--kv-cache-memory-bytes", passed=False)] = None
    """Size of the KV cache, in bytes. None keeps vLLM's default on a GPU, and is 256 MB on the CPU."""
    sleep_mode: Annotated[bool, Flag("vllm", "--enable-sleep-mode", passed=False)] = True
    """Release GPU memory when the engine sleeps. It has no effect on the CPU."""
    data_parallel_rpc_port: Annotated[PositiveInt | None, Flag("vllm", "--data-parallel-rpc-port", passed=False)] = None
    """Port on node 0 for data-parallel ranks on other hosts, in addition to dist_init_addr."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        world = self.tp_size * self.dp_size
        if self.ep_size not in (1, world):
            raise ValueError(
                f"vLLM spreads experts over all tp_size x dp_size = {world} ranks, or does not spread them (1); "
                f"ep_size is {self.ep_size}"
            )
        if world * self.pp_size % self.nnodes:
            raise ValueError(
                f"tp_size {self.tp_size} x pp_size {self.pp_size} x dp_size {self.dp_size} can't be split over "
                f"{self.nnodes} nodes"
            )
        if self.nnodes > 1 and self.node_rank is not None and self.dp_size > 1 and self.data_parallel_rpc_port is None:
            raise ValueError(
                "data-parallel ranks on several hosts also need data_parallel_rpc_port, a free port on node 0's host"
            )
        return self


EngineConfig = Annotated[EmbeddedEngineConfig | SGLangEngineConfig | VLLMEngineConfig, Field(discriminator="kind")]


class RolloutConfig(Model):
    """How rollouts are sampled."""

    groups_per_step: PositiveInt
    """Number of groups (problems) that one step trains on."""
    samples_per_group: Annotated[int, Field(ge=2)]
    """Number of samples for each problem."""
    max_turns: PositiveInt = 4
    """Maximum number of turns in one sample."""
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
    tools: tuple[str, ...] = ("calculator",)
    """Names of the tools that the model may call."""
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
    """Maximum number of versions that a sample may lag behind the weights that train on it. Mode hybrid is on-policy
    (0) unless it recycles."""
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
    """Share of the grade in the reward: reward = weight x grade + (1 - weight) x rule reward."""
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
    threads: PositiveInt | None = None
    """Number of CPU threads that torch uses. None keeps torch's default."""
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
    """Seconds for the whole update of one engine."""
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
    """The metrics server, which shows the state of a run's engines to Prometheus and `millrace status`.

    It is read-only and asks for no key: every client that reaches the port can read the metrics.
    """

    host: str = "127.0.0.1"
    """Address that the metrics server listens on."""
    port: Annotated[int, Field(ge=0, le=65535)]
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
    """A model that grades the answers. None uses only the rule reward."""
    metrics: MetricsConfig | None = None
    """Metrics for Prometheus and `millrace status`. None is off."""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        rollout = self.rollout
        if rollout.max_turn_tokens > rollout.max_sample_tokens:
            raise ValueError("rollout.max_turn_tokens is above rollout.max_sample_tokens; no turn could be that long")
        if self.router is not None:
            check_router(self.router, self.engine.kind)
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
