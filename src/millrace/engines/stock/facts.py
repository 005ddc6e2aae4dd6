"""What does not change while a server runs."""

from dataclasses import dataclass

from millrace.engines.stock.model import Model
from millrace.types import EngineInfo


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes of a request. `seeds`: whether it honours them."""

    vocab_size: int
    context_length: int
    seeds: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """`info` is without the weight version, which changes."""

    info: EngineInfo
    model: Model
    limits: Limits
