"""The reference trainer: GRPO with rollouts from a fleet."""

from typing import TYPE_CHECKING

from millrace.lazy import exports

if TYPE_CHECKING:
    from millrace.train.sample_files import read_samples
    from millrace.train.tiny import make_tiny_model

__getattr__, __dir__ = exports(
    __name__,
    {
        "millrace.train.sample_files": ["read_samples"],
        "millrace.train.tiny": ["make_tiny_model"],
    },
)

__all__ = [
    "make_tiny_model",
    "read_samples",
]
