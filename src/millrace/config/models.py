"""Every setting, as pydantic models. An unknown key is an error; a setting is honoured or refused, never ignored. The
docstring below a setting is its description, which `millrace config` prints."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from millrace.config.base import ForeignArgument, Model
from millrace.config.judging import TEMPLATE, VERDICT, check_template, check_verdict
from millrace.config.paths import LocalPath, PathOrName
from millrace.config.routers import RouterConfig, check_router

EngineArgument = ForeignArgument
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class TinyModelConfig(Model):
    """A small Qwen3 over a word-level vocabulary, from random weights made by the run's seed. For demos and tests."""

    kind: Literal["tiny"]
    """A model from random weights."""
    layers: PositiveInt = 2
    """Transformer layers."""
    hidden_size: PositiveInt = 128
    """Width of the hidden states."""
    heads: PositiveInt = 4
    """Attention heads."""
    context_length: PositiveInt = 256
    """Longest sequence, in tokens."""


class PretrainedModelConfig(Model):
    """A folder in Hugging Face's format, with its tokenizer, or a name on the Hub."""

    kind: Literal["pretrained"]
    """A model that exists."""
    path: PathOrName
    """The model's folder, or its name on the Hugging Face Hub."""


ModelConfig = Annotated[TinyModelConfig | PretrainedModelConfig, Field(discriminator="kind")]


class GeneratedDataConfig(Model):
    """Word problems in GSM8K's format from the seeded generator (`millrace.rollout.problems`)."""

    kind: Literal["generated"]
    """Generated problems."""
    seed: int
    """Seed of the generator. The same seed gives the same problems."""
    problems: PositiveInt
    """Number of problems."""


class FileDataConfig(Model):
    """A JSONL file in GSM8K's format: `question`, and `answer` that ends in `#### n`."""

    kind: Literal["file"]
    """A JSONL file."""
    path: LocalPath
    """The file."""


class HubDataConfig(Model):
    """A data set on the Hugging Face Hub in GSM8K's format. Needs the extra `millrace[hub]`."""

    kind: Literal["hub"]
    """A data set on the Hub."""
    path: PathOrName
    """Name of the data set, such as `openai/gsm8k`, or a folder that `datasets` reads."""
    name: str | None = None
    """Configuration of the data set, such as `main`."""
    split: str
    """Split of the data set, such as `train`."""


DataConfig = Annotated[GeneratedDataConfig | FileDataConfig | HubDataConfig, Field(discriminator="kind")]


class ReplicatedConfig(Model):
    """What every kind of engine is told that Millrace launches."""

    replicas: PositiveInt = 1
    """Number of servers, each with the whole model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the engine's weights and computation. `auto` is the dtype of the model's folder; SGLang and vLLM on a
    GPU serve a float32 folder in bfloat16."""
    max_running_requests: PositiveInt = 64
    """Requests that one server runs at the same time. Others wait in its queue."""
    threads: PositiveInt | None = None
    """CPU threads of torch. None keeps torch's default."""
    host: str = "127.0.0.1"
    """Address that the servers listen on."""
    ports: tuple[PositiveInt, ...] | None = None
    """One port for each replica. None takes free ports."""
    start_timeout: PositiveFloat = 60.0
    """Seconds until a server must be healthy."""

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
    """Millrace's own engine."""
    device: str = "cpu"
    """Device of torch: `cpu`, `cuda` or `cuda:N`."""
    cached_prefixes: Annotated[int, Field(ge=0)] = 64
    """Prompt prefixes that the KV cache keeps. 0 turns the prefix cache off."""
    context_length: PositiveInt | None = None
    """Longest sequence, in tokens of prompt and output. None takes the model's own."""
    faults: bool = False
    """For tests: the engine crashes, hangs or refuses on request."""


class StockEngineConfig(ReplicatedConfig):
    """What the stock engines are told alike. Three ways to one: the environment that `millrace engines install` made,
    an interpreter that has the engine (`python`), or servers that somebody else started (`urls`; their keys are read
    from the environment: MILLRACE_ENGINE_API_KEY and MILLRACE_ENGINE_ADMIN_API_KEY)."""

    version: str
    """Version of the engine whose environment is used."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What the engine runs on."""
    python: LocalPath | None = None
    """An interpreter that has the engine. None uses the environment that `millrace engines install` made."""
    urls: tuple[str, ...] | None = None
    """Running servers to attach to, one for each replica. Their keys come from MILLRACE_ENGINE_API_KEY and
    MILLRACE_ENGINE_ADMIN_API_KEY."""
    tp_size: PositiveInt = 1
    """Tensor-parallel ranks."""
    pp_size: PositiveInt = 1
    """Pipeline-parallel stages."""
    dp_size: PositiveInt = 1
    """Data-parallel ranks."""
    ep_size: PositiveInt = 1
    """Expert-parallel ranks."""
    nnodes: PositiveInt = 1
    """Nodes that one engine runs on."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """The node that this host is. None: this host is all nodes."""
    dist_init_addr: Annotated[str, Field(pattern=r"^.+:\d+$")] | None = None
    """host:port of node 0. None takes a free port where this host is all nodes."""
    base_gpu_id: Annotated[int, Field(ge=0)] = 0
    """First GPU. Replica r starts at base_gpu_id + r x the GPUs of one replica."""
    cuda_visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the servers. None keeps this process's."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Level of the servers' logs."""
    kv_events: bool = False
    """The engine reports which prefixes its KV cache holds, and routing uses that. Needs the extra
    `millrace[kv-events]`."""
    start_timeout: PositiveFloat = 600.0
    """Seconds until a server must be healthy. A large model on a slow disk takes minutes, a small one on the CPU 20 to
    60 s."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables that are added to the servers' environment."""
    engine_args: dict[str, EngineArgument] = Field(default_factory=dict)
    """The engine's own arguments, by their own names. A dictionary becomes JSON."""

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
    """Stock SGLang."""
    version: str = "0.5.23"
    """Version of SGLang."""
    max_total_tokens: PositiveInt | None = None
    """Tokens that the KV cache holds. None keeps SGLang's default on a GPU, and is 65536 on the CPU."""
    mem_fraction_static: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the GPU's memory for weights and KV cache. None keeps SGLang's default."""
    memory_saver: bool = True
    """Sleep releases GPU memory. It has no effect on the CPU."""

    @model_validator(mode="after")
    def _splits(self) -> Self:
        if self.tp_size * self.pp_size % self.nnodes:
            raise ValueError(f"tp_size {self.tp_size} x pp_size {self.pp_size} can't be split over {self.nnodes} nodes")
        return self


class VLLMEngineConfig(StockEngineConfig):
    """Stock vLLM."""

    kind: Literal["vllm"]
    """Stock vLLM."""
    version: str = "0.32.0"
    """Version of vLLM."""
    api_servers: PositiveInt = 1
    """Processes that answer HTTP at the same port."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the GPU's memory that vLLM takes. None keeps vLLM's default."""
    kv_cache_memory_bytes: PositiveInt | None = None
    """Bytes of KV cache. None keeps vLLM's default on a GPU, and is 256 MB on the CPU."""
    sleep_mode: bool = True
    """Sleep releases GPU memory. It has no effect on the CPU."""
    data_parallel_rpc_port: PositiveInt | None = None
    """Port of node 0 for data-parallel ranks of other hosts, in addition to dist_init_addr."""

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
    """Groups (problems) that one step trains on."""
    samples_per_group: Annotated[int, Field(ge=2)]
    """Samples of each problem."""
    max_turns: PositiveInt = 4
    """Most turns of one sample."""
    max_turn_tokens: PositiveInt
    """Most tokens of one turn."""
    max_sample_tokens: PositiveInt
    """Most tokens of one sample: prompt, turns and tool answers together."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. 1 is off."""
    top_k: int = -1
    """The k most likely tokens are sampled from. -1 is off."""
    min_p: Probability = 0.0
    """Tokens below this share of the most likely one are left out. 0 is off."""
    tools: tuple[str, ...] = ("calculator",)
    """Names of the tools that the model may call."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the model's chat template, as in `{enable_thinking: false}`. Every prompt and every turn
    gets them."""
    sample_timeout: PositiveFloat = 300.0
    """Seconds for one sample, all turns and retries together."""
    sample_retries: Annotated[int, Field(ge=0)] = 2
    """Retries of a sample whose engine died."""
    partial_rollouts: bool = True
    """A retried sample keeps the tokens that it has. Otherwise it starts from the prompt."""
    max_staleness: Annotated[int, Field(ge=0)] = 1
    """Versions that a sample may be older than the weights it trains. Mode hybrid is on-policy (0), unless it
    recycles."""
    over_sampling: Annotated[int, Field(ge=0)] = 0
    """Groups started beyond groups_per_step. The first complete ones count."""
    recycle: bool = False
    """Mode hybrid: samples that a step leaves unfinished continue in the next step. Otherwise they are aborted."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """Groups that a step may replace because all their rewards are the same (DAPO, arXiv:2503.14476)."""


class JudgeConfig(Model):
    """Engines of a frozen model that is asked for a part of the reward (docs/judges.md)."""

    model: ModelConfig
    """The judge's model."""
    engine: EngineConfig
    """The judge's engines."""
    mode: Literal["colocated", "standalone"] = "standalone"
    """`colocated` takes turns with the policy's engines, `standalone` has devices of its own."""
    seed: int = 0
    """Seed of a tiny model's weights."""
    template: Annotated[str, AfterValidator(check_template)] = TEMPLATE
    """The judge's prompt, with {question}, {answer} (the model's last turn) and {reference}."""
    verdict: Annotated[str, AfterValidator(check_verdict)] = VERDICT
    """Regular expression whose one group is the grade. The last match in the judge's answer counts."""
    best: PositiveFloat = 10.0
    """The grade that becomes reward 1. Grade 0 becomes 0, and a number outside of 0 to `best` is no grade."""
    max_new_tokens: PositiveInt = 512
    """Most tokens of the judge's answer."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the grade: reward = weight x grade + (1 - weight) x rule reward."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts in a row of one engine that died or hangs."""


class OptimizerConfig(Model):
    """AdamW, with a linear warm-up to `lr` and then the named schedule."""

    lr: PositiveFloat
    """Learning rate after the warm-up."""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """AdamW's betas."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Schedule of the learning rate after the warm-up."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of the linear warm-up."""
    min_lr_ratio: Probability = 0.0
    """Share of `lr` at which the schedule ends."""


class LossConfig(Model):
    """GRPO's loss (DeepSeekMath, arXiv:2402.03300), with the later options that the field uses."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: PositiveFloat = 0.28
    """The ratio is clipped above 1 + clip_high. Above clip_low it is DAPO's clip-higher (arXiv:2503.14476)."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL term. Above 0 a frozen copy of the first weights is kept as the reference."""
    average: Literal["token", "sequence"] = "token"
    """What the loss is averaged over."""
    normalize_advantages: bool = True
    """Divide advantages by the group's standard deviation. False is Dr. GRPO (arXiv:2503.20783)."""
    importance_cap: PositiveFloat | None = 2.0
    """Cap of the truncated importance weight against the engine's logprobs. None is off."""


class WarmupConfig(OptimizerConfig):
    """Supervised steps before the reinforcement, for a model from random weights: they teach the format of an answer
    on the generator's stories (`millrace.train.warmup_data`)."""

    steps: PositiveInt
    """Supervised steps."""
    batch_size: PositiveInt = 32
    """Conversations in one step."""
    seed: int = 0
    """Seed of the endless stream of conversations."""


class TrainConfig(OptimizerConfig):
    """The reinforcement, with its optimizer's settings beside the others, as in `train.lr`."""

    steps: PositiveInt
    """Steps of the run."""
    loss: LossConfig = LossConfig()
    """GRPO's loss."""
    minibatches: PositiveInt = 1
    """Optimizer steps on one step's samples."""
    tokens_per_microbatch: PositiveInt = 8192
    """Most tokens of one forward pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the forward pass. The master weights are float32."""
    device: str = "cpu"
    """Device of torch: `cpu`, `cuda` or `cuda:N`."""
    threads: PositiveInt | None = None
    """CPU threads of torch. None keeps torch's default."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, which saves memory."""


class EvaluationConfig(Model):
    """Greedy answers to held-out problems."""

    data: DataConfig
    """The held-out problems."""
    every: PositiveInt = 5
    """Steps between two evaluations. The first and the last step are always evaluated."""
    problems: PositiveInt = 128
    """Number of problems that are evaluated."""


class CheckpointConfig(Model):
    """When the trainer's state is saved."""

    every: PositiveInt = 10
    """Steps between two checkpoints. The last step is always saved."""
    keep: PositiveInt = 2
    """Checkpoints that are kept."""


TransportName = Literal["auto", "shm", "cuda_ipc", "gloo", "nccl", "disk", "delta", "ucx"]


class PublishConfig(Model):
    """How new weights reach the engines."""

    transport: TransportName = "auto"
    """How weights travel to the engines. `auto` chooses by what engines and trainer share."""
    folder: PathOrName | None = None
    """Where versions are kept: a path, or a URL of fsspec. With transport disk the engines read it too."""
    keep: PositiveInt = 2
    """Versions that are kept."""
    sidecars: tuple[str, ...] = ()
    """For delta and ucx: the URL of `millrace sidecar` on each host of engines."""
    bucket_bytes: PositiveInt = 256 * 1024 * 1024
    """Bytes of one bucket of tensors."""
    timeout: PositiveFloat = 120.0
    """Seconds for the whole transaction on one engine."""
    require_finite: bool = True
    """Refuse to publish weights that contain NaN or infinite values."""

    @model_validator(mode="after")
    def _possible(self) -> "PublishConfig":
        if self.transport in ("disk", "delta") and self.folder is None:
            raise ValueError(f"publish.transport is {self.transport}, and publish.folder does not say where")
        if self.sidecars and self.transport not in ("auto", "delta", "ucx"):
            raise ValueError(f"publish.sidecars are for publish.transport delta or ucx, and it is {self.transport}")
        if self.sidecars and self.transport == "auto" and self.folder is not None:
            raise ValueError(
                "publish.sidecars can bring versions of publish.folder (publish.transport: delta), or read "
                "buckets from the trainer's memory (ucx); say which as publish.transport"
            )
        if self.transport == "ucx" and not self.sidecars:
            raise ValueError("publish.transport is ucx, and publish.sidecars names no `millrace sidecar`")
        return self


class MetricsConfig(Model):
    """Where a run shows how its engines stand, to Prometheus and to `millrace status`. It asks for no key: who reaches
    the port may read, and change nothing."""

    host: str = "127.0.0.1"
    """Address that the metrics server listens on."""
    port: Annotated[int, Field(ge=0, le=65535)]
    """Its port. 0 takes a free one."""


class RunConfig(Model):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run, and of its folder below output_dir."""
    output_dir: LocalPath = Path("runs")
    """Folder of all runs."""
    seed: int = 0
    """Seed of everything random in the run."""
    mode: Literal["hybrid", "standalone"] = "hybrid"
    """`hybrid`: engines and trainer share their devices and take turns. `standalone`: both work at the same time."""
    model: ModelConfig
    """The model that is trained."""
    engine: EngineConfig
    """The engines that generate."""
    data: DataConfig
    """The training problems."""
    rollout: RolloutConfig
    """How samples are made."""
    warmup: WarmupConfig | None = None
    """Supervised steps before the reinforcement. None is off."""
    train: TrainConfig
    """The reinforcement."""
    evaluation: EvaluationConfig
    """Greedy answers to held-out problems."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved."""
    publish: PublishConfig = PublishConfig()
    """How weights reach the engines."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts in a row of one engine that died or hangs."""
    router: RouterConfig | None = None
    """A router of another project between requests and engines. Its name alone is enough. None sends requests straight
    to the engines."""
    judges: JudgeConfig | None = None
    """Engines that grade answers. None leaves the reward to the rule."""
    metrics: MetricsConfig | None = None
    """Metrics for Prometheus and `millrace status`. None is off."""

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
