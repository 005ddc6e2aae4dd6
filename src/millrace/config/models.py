"""Every setting, as pydantic models. An unknown key is an error; a setting is honoured or refused, never ignored."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from millrace.config.base import ForeignArgument, Model
from millrace.config.judging import TEMPLATE, VERDICT, check_template, check_verdict
from millrace.config.routers import RouterConfig, check_router

EngineArgument = ForeignArgument
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class TinyModelConfig(Model):
    """A small Qwen3 over a word-level vocabulary, from random weights made by the run's seed. For demos and tests."""

    kind: Literal["tiny"]
    layers: PositiveInt = 2
    hidden_size: PositiveInt = 128
    heads: PositiveInt = 4
    context_length: PositiveInt = 256


class PretrainedModelConfig(Model):
    """A folder in Hugging Face's format, with its tokenizer, or a name on the Hub."""

    kind: Literal["pretrained"]
    path: str


ModelConfig = Annotated[TinyModelConfig | PretrainedModelConfig, Field(discriminator="kind")]


class GeneratedDataConfig(Model):
    """Word problems in GSM8K's format from the seeded generator (`millrace.rollout.problems`)."""

    kind: Literal["generated"]
    seed: int
    problems: PositiveInt


class FileDataConfig(Model):
    """A JSONL file in GSM8K's format: `question`, and `answer` that ends in `#### n`."""

    kind: Literal["file"]
    path: Path


class HubDataConfig(Model):
    """A data set on the Hugging Face Hub in GSM8K's format. Needs the extra `millrace[hub]`."""

    kind: Literal["hub"]
    path: str
    name: str | None = None
    split: str


DataConfig = Annotated[GeneratedDataConfig | FileDataConfig | HubDataConfig, Field(discriminator="kind")]


class ReplicatedConfig(Model):
    """What every kind of engine is told that Millrace launches."""

    replicas: PositiveInt = 1
    max_running_requests: PositiveInt = 64
    threads: PositiveInt | None = None  # of torch, on the CPU; None leaves it to torch
    host: str = "127.0.0.1"
    ports: tuple[PositiveInt, ...] | None = None  # one for each replica; None takes what the kernel gives
    start_timeout: PositiveFloat = 60.0

    @model_validator(mode="after")
    def _a_port_each(self) -> Self:
        if self.ports is not None and len(self.ports) != self.replicas:
            raise ValueError(
                f"ports names {len(self.ports)} ports for {self.replicas} replicas; give one each or leave it out"
            )
        return self


class EmbeddedEngineConfig(ReplicatedConfig):
    """Millrace's own engine: any causal model of transformers, on the CPU or one GPU."""

    kind: Literal["embedded"]
    device: str = "cpu"
    cached_prefixes: Annotated[int, Field(ge=0)] = 64
    faults: bool = False  # for tests: the engine crashes, hangs or refuses when it is told to


class StockEngineConfig(ReplicatedConfig):
    """What the stock engines are told alike. Three ways to one: the environment that `millrace engines install` made,
    an interpreter that has the engine (`python`), or servers that somebody else started (`urls`; their keys are read
    from the environment: MILLRACE_ENGINE_API_KEY and MILLRACE_ENGINE_ADMIN_API_KEY)."""

    version: str
    device: Literal["cuda", "cpu"] = "cuda"
    python: Path | None = None
    urls: tuple[str, ...] | None = None
    tp_size: PositiveInt = 1
    pp_size: PositiveInt = 1
    dp_size: PositiveInt = 1
    ep_size: PositiveInt = 1
    nnodes: PositiveInt = 1
    node_rank: Annotated[int, Field(ge=0)] | None = None  # the node that is this host; None: all nodes are
    # host:port of node 0; None, where all nodes are this host: what the kernel gives
    dist_init_addr: Annotated[str, Field(pattern=r"^.+:\d+$")] | None = None
    base_gpu_id: Annotated[int, Field(ge=0)] = 0  # replica r starts at base_gpu_id + r x its GPUs
    cuda_visible_devices: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    kv_events: bool = False  # routing learns from the engine's own events which prefixes it has
    start_timeout: PositiveFloat = 600.0  # a large model over a slow disk; the CPU form needs 20 to 60 s
    env: dict[str, str] = Field(default_factory=dict)  # added to the server's environment
    engine_args: dict[str, EngineArgument] = Field(default_factory=dict)  # the engine's own, by their own names

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.urls is not None and self.python is not None:
            raise ValueError("urls attaches to running servers and python launches new ones; give one of them")
        if self.urls is not None and len(self.urls) != self.replicas:
            raise ValueError(f"urls names {len(self.urls)} servers for {self.replicas} replicas; set replicas to it")
        if self.node_rank is not None and self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank {self.node_rank} is not below nnodes {self.nnodes}")
        if self.node_rank is not None and self.nnodes > 1 and self.dist_init_addr is None:
            raise ValueError("nodes on several hosts meet at dist_init_addr (host:port of node 0); it is missing")
        if self.nnodes > 1 and self.replicas > 1:
            raise ValueError("an engine over several nodes is launched alone; set replicas to 1")
        if self.kv_events and self.urls is not None:
            raise ValueError("kv_events is for engines that are launched; where one at urls publishes, nobody says")
        if self.kv_events and self.dp_size > 1:
            raise ValueError(
                f"kv_events is for engines of one KV cache, and with dp_size {self.dp_size} each rank has its own; set "
                "replicas instead, or leave kv_events out"
            )
        return self


class SGLangEngineConfig(StockEngineConfig):
    """Stock SGLang."""

    kind: Literal["sglang"]
    version: str = "0.5.23"
    max_total_tokens: PositiveInt | None = None  # of KV cache; on the CPU, where SGLang's default is 20 GB, 65536
    mem_fraction_static: Annotated[float, Field(gt=0, lt=1)] | None = None
    memory_saver: bool = True  # what makes sleep release memory; on the CPU there is none

    @model_validator(mode="after")
    def _splits(self) -> Self:
        if self.tp_size * self.pp_size % self.nnodes:
            raise ValueError(f"tp_size {self.tp_size} x pp_size {self.pp_size} can't be split over {self.nnodes} nodes")
        return self


class VLLMEngineConfig(StockEngineConfig):
    """Stock vLLM."""

    kind: Literal["vllm"]
    version: str = "0.32.0"
    api_servers: PositiveInt = 1  # processes that answer HTTP, at one port
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_cache_memory_bytes: PositiveInt | None = None  # on the CPU, where vLLM's own default fails, 256 MB
    sleep_mode: bool = True  # what makes sleep release memory; on the CPU there is none
    # Where data-parallel ranks of other hosts reach node 0, besides dist_init_addr
    data_parallel_rpc_port: PositiveInt | None = None

    @model_validator(mode="after")
    def _vllm_can(self) -> Self:
        world = self.tp_size * self.dp_size
        if self.ep_size not in (1, world):
            raise ValueError(
                f"vLLM spreads experts over all of tp_size x dp_size = {world} ranks or over none (1); ep_size is "
                f"{self.ep_size}"
            )
        if world * self.pp_size % self.nnodes:
            raise ValueError(
                f"tp_size {self.tp_size} x pp_size {self.pp_size} x dp_size {self.dp_size} can't be split over "
                f"{self.nnodes} nodes"
            )
        if self.nnodes > 1 and self.node_rank is not None and self.dp_size > 1 and self.data_parallel_rpc_port is None:
            raise ValueError(
                "data-parallel ranks on several hosts need data_parallel_rpc_port too, a free port of node 0's host"
            )
        return self


EngineConfig = Annotated[EmbeddedEngineConfig | SGLangEngineConfig | VLLMEngineConfig, Field(discriminator="kind")]


class RolloutConfig(Model):
    """How samples are made."""

    groups_per_step: PositiveInt
    samples_per_group: Annotated[int, Field(ge=2)]
    max_turns: PositiveInt = 4
    max_turn_tokens: PositiveInt
    max_sample_tokens: PositiveInt  # prompt, turns and tool answers together
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    min_p: Probability = 0.0
    tools: tuple[str, ...] = ("calculator",)
    sample_timeout: PositiveFloat = 300.0
    sample_retries: Annotated[int, Field(ge=0)] = 2  # when an engine dies under a sample
    partial_rollouts: bool = True  # what it had of the sample then stays; otherwise the sample begins again
    # In versions. Mode hybrid is on-policy, 0 whatever stands here, unless it recycles.
    max_staleness: Annotated[int, Field(ge=0)] = 1
    over_sampling: Annotated[int, Field(ge=0)] = 0  # groups started beyond groups_per_step; the first complete count
    recycle: bool = False  # in mode hybrid, what a step leaves unfinished goes on in the next; else it is given up
    # Groups that a step may drop for others since their rewards are all alike (DAPO, arXiv:2503.14476)
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0


class JudgeConfig(Model):
    """Engines of a frozen model that is asked for a part of the reward (docs/judges.md)."""

    model: ModelConfig
    engine: EngineConfig
    mode: Literal["colocated", "standalone"] = "standalone"  # in turns with the policy's engines; or on its own
    seed: int = 0  # of a tiny model's weights
    # What it is asked, with {question}, {answer} (the model's last turn) and {reference}
    template: Annotated[str, AfterValidator(check_template)] = TEMPLATE
    # Its group is the grade, a number; the last match in what the judge says counts
    verdict: Annotated[str, AfterValidator(check_verdict)] = VERDICT
    best: PositiveFloat = 10.0  # the grade that makes 1; 0 makes 0, and what is not between them is no grade
    max_new_tokens: PositiveInt = 512
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0  # reward = weight x grade + (1 - weight) x rule reward
    restarts: Annotated[int, Field(ge=0)] = 3  # of one engine in a row, where it dies or hangs


class OptimizerConfig(Model):
    """AdamW, with a linear warm-up to `lr` and then the named schedule."""

    lr: PositiveFloat
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Probability = 0.0


class LossConfig(Model):
    """GRPO's loss (DeepSeekMath, arXiv:2402.03300), with the later options that the field uses."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: PositiveFloat = 0.28  # above clip_low: DAPO's clip-higher, arXiv:2503.14476
    kl_coefficient: NonNegativeFloat = 0.0  # above 0 a frozen copy of the first weights is the reference
    average: Literal["token", "sequence"] = "token"
    normalize_advantages: bool = True  # divide by the group's standard deviation; False is Dr. GRPO, arXiv:2503.20783
    importance_cap: PositiveFloat | None = (
        2.0  # truncated importance sampling against the engine's logprobs; None is off
    )


class WarmupConfig(OptimizerConfig):
    """Supervised steps before the reinforcement, for a model from random weights: they teach the format of an answer
    on the generator's stories (`millrace.train.warmup_data`)."""

    steps: PositiveInt
    batch_size: PositiveInt = 32
    seed: int = 0  # of the endless stream of conversations


class TrainConfig(OptimizerConfig):
    """The reinforcement, with its optimizer's settings beside the others, as in `train.lr`."""

    steps: PositiveInt
    loss: LossConfig = LossConfig()
    minibatches: PositiveInt = 1  # optimizer steps taken on one step's samples
    tokens_per_microbatch: PositiveInt = 8192
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward pass; the master weights are float32
    device: str = "cpu"
    threads: PositiveInt | None = None  # of torch, on the CPU; None leaves it to torch
    gradient_checkpointing: bool = False


class EvaluationConfig(Model):
    """Greedy answers to held-out problems."""

    data: DataConfig
    every: PositiveInt = 5  # steps; the first and the last step are always evaluated
    problems: PositiveInt = 128


class CheckpointConfig(Model):
    every: PositiveInt = 10  # steps; the last step is always saved
    keep: PositiveInt = 2


TransportName = Literal["auto", "shm", "cuda_ipc", "gloo", "nccl", "disk", "delta", "ucx"]


class PublishConfig(Model):
    transport: TransportName = "auto"
    folder: str | None = None  # where versions are kept: a path, or a URL of fsspec's; for disk, one that engines know
    keep: PositiveInt = 2  # versions
    couriers: tuple[str, ...] = ()  # for delta and ucx: the URL of `millrace courier` on each host of engines
    bucket_bytes: PositiveInt = 256 * 1024 * 1024
    timeout: PositiveFloat = 120.0  # for the whole transaction on one engine
    require_finite: bool = False

    @model_validator(mode="after")
    def _possible(self) -> "PublishConfig":
        if self.transport in ("disk", "delta") and self.folder is None:
            raise ValueError(f"publish.transport is {self.transport}, and publish.folder does not say where")
        if self.couriers and self.transport not in ("auto", "delta", "ucx"):
            raise ValueError(f"publish.couriers are for publish.transport delta or ucx, and it is {self.transport}")
        if self.couriers and self.transport == "auto" and self.folder is not None:
            raise ValueError(
                "publish.couriers can bring versions of publish.folder (publish.transport: delta), or read "
                "buckets from the trainer's memory (ucx); say which as publish.transport"
            )
        if self.transport == "ucx" and not self.couriers:
            raise ValueError("publish.transport is ucx, and publish.couriers names no `millrace courier`")
        return self


class MetricsConfig(Model):
    """Where a run shows how its engines stand, to Prometheus and to `millrace status`. It asks for no key: who reaches
    the port may read, and change nothing."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)]  # 0 takes what the kernel gives


class RunConfig(Model):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output_dir: Path = Path("runs")
    seed: int = 0
    mode: Literal["hybrid", "standalone"] = "hybrid"
    model: ModelConfig
    engine: EngineConfig
    data: DataConfig
    rollout: RolloutConfig
    warmup: WarmupConfig | None = None
    train: TrainConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    publish: PublishConfig = PublishConfig()
    restarts: Annotated[int, Field(ge=0)] = 3  # of one engine in a row, where it dies or hangs
    router: RouterConfig | None = None
    judges: JudgeConfig | None = None
    metrics: MetricsConfig | None = None

    @model_validator(mode="after")
    def _possible(self) -> "RunConfig":
        rollout = self.rollout
        if rollout.max_turn_tokens > rollout.max_sample_tokens:
            raise ValueError("rollout.max_turn_tokens is above rollout.max_sample_tokens; no turn could be that long")
        if self.router is not None:
            check_router(self.router, self.engine.kind)
        if rollout.recycle:
            if self.mode != "hybrid":
                raise ValueError("rollout.recycle is for mode hybrid; in standalone everything goes on while it trains")
            if not (rollout.over_sampling and rollout.partial_rollouts and rollout.max_staleness):
                raise ValueError(
                    "rollout.recycle keeps what over-sampling leaves unfinished; it needs rollout.over_sampling, "
                    "rollout.partial_rollouts and a rollout.max_staleness of at least 1"
                )
        if self.judges is not None and self.judges.mode == "colocated":
            if self.mode != "hybrid":
                raise ValueError(
                    "judges.mode colocated takes turns with engines that sleep between the steps, which they do in "
                    "mode hybrid; in standalone they generate all the time: give the judges devices of their own"
                )
            if rollout.dynamic_sampling:
                raise ValueError(
                    "rollout.dynamic_sampling chooses groups by their rewards while they are generated, which judges "
                    "of mode colocated give afterwards; take judges.mode standalone"
                )
        return self
