"""The settings of what a run starts from: its model and its problems."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from millrace.config.base import Model
from millrace.config.paths import PathOrName
from millrace.config.tasks import ColumnsConfig, FilePath


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


class FileDataConfig(ColumnsConfig):
    """A file with one problem in each row (docs/tasks.md). Its suffix is `.jsonl`, `.csv` or `.parquet`."""

    kind: Literal["file"]
    """A file."""
    path: FilePath
    """Path of the file, beside the config or in the current folder."""


class HubDataConfig(ColumnsConfig):
    """A data set on the Hugging Face Hub (docs/tasks.md). It needs the extra `millrace[hub]`."""

    kind: Literal["hub"]
    """A data set on the Hub."""
    path: PathOrName
    """Name of the data set, such as `openai/gsm8k`, or a folder that the library `datasets` can load."""
    name: str | None = None
    """Configuration of the data set, such as `main`."""
    split: str
    """Split of the data set, such as `train`."""


class TasksDataConfig(Model):
    """The tasks of the verifiers environment (`environment.verifiers`, docs/tasks.md)."""

    kind: Literal["tasks"]
    """The environment's own tasks."""
    select: dict[str, Any] = Field(default_factory=dict)
    """Which of them, as in verifiers' `select`: `include`, `exclude`, `shuffle`, `seed`, `skip` and `limit`."""


DataConfig = Annotated[
    GeneratedDataConfig | FileDataConfig | HubDataConfig | TasksDataConfig, Field(discriminator="kind")
]
