"""A plugin for SGLang that makes its CUDA events do nothing, which its transfers of KV cache wait for.

On the CPU, a step has ended when its result is there. SGLang finds the plugin if this folder is on the server's
PYTHONPATH.
"""

import torch


class Event:
    """An event that has happened."""

    def record(self, *_: object) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


def install() -> None:
    """Replace the events. SGLang calls this in each of its processes."""
    torch.cuda.Event = Event  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *_: None  # type: ignore[assignment]
