"""Routing replay (arXiv:2510.11370): a mixture of experts is trained with the experts that the engine chose.

Engine and trainer round differently, so a router's close decisions fall differently in the two, and a token's logprob
then differs by much more than by rounding. Replay makes the trainer's routers choose the engine's experts. The weights
of these experts are still the trainer's own: each router gathers and normalises its scores as it always does. So
gradients flow into the router.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from millrace.errors import DataError

# The names that transformers' configs have for the number of experts of a layer.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOPK: frozenset[Callable[..., Any]] = frozenset({torch.topk, Tensor.topk})


class _Choice(TorchFunctionMode):
    """While it is active, a top-k over all experts of all tokens returns the given experts.

    experts_NK: int64; -1 where they are not known, and the top-k's own are kept. made: how often one was returned.
    """

    def __init__(self, experts_NK: Tensor, count: int) -> None:
        super().__init__()
        self._experts_NK, self._count = experts_NK, count
        self.made = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in TOPK:
            return result
        scores = args[0] if args else (kwargs or {})["input"]
        own = result.indices
        # Routers that first choose groups of experts take the top-k of other shapes, too.
        if own.shape != self._experts_NK.shape or scores.shape != (len(own), self._count):
            return result
        self.made += 1
        indices = torch.where(self._experts_NK < 0, own, self._experts_NK)
        return torch.return_types.topk((scores.gather(-1, indices), indices))


class RoutingReplay:
    """Replays routed experts in the forward passes of one model.

    The blocks are the modules with a submodule `experts`, as all mixtures of experts in transformers have. A block
    routes its tokens by one top-k over the scores of all experts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._blocks = [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)]
        config = model.config.get_text_config()
        counts = [count for name in COUNTS if isinstance(count := getattr(config, name, None), int)]
        self._count = counts[0] if counts else 0
        self._name = model.config.model_type
        self._experts_BTLK: Tensor | None = None
        self._active: dict[int, _Choice] = {}  # by the block's number, while it runs
        self._made: list[int] = [0] * len(self._blocks)
        for number, block in enumerate(self._blocks):
            block.register_forward_pre_hook(self._before(number))
            block.register_forward_hook(self._after(number), always_call=True)

    @contextmanager
    def replaying(self, experts_BTLK: Tensor | None) -> Iterator[None]:
        """Replay experts in the forward pass in this block.

        experts_BTLK: integers on the model's device, -1 where they are not known and the model chooses. None: it always
        chooses. With gradient checkpointing, layers run again in the backward pass, which must come before the next
        forward pass. Raises DataError if the model's routers can't be replayed, or the experts are not this model's.
        """
        self._check(experts_BTLK)
        self._experts_BTLK, self._made = experts_BTLK, [0] * len(self._blocks)
        yield
        if experts_BTLK is not None and (wrong := {made for made in self._made if made != 1}):
            raise DataError(
                f"routing replay does not know how {self._name} routes: a layer has {wrong.pop()} top-k over its "
                f"{self._count} experts for each token, and not 1; leave out engine.return_routed_experts"
            )

    def _check(self, experts_BTLK: Tensor | None) -> None:
        if experts_BTLK is None:
            return
        layers = experts_BTLK.shape[2]
        if not self._blocks or layers != len(self._blocks):
            raise DataError(
                f"the samples have routed experts of {layers} layers, and the policy ({self._name}) has "
                f"{len(self._blocks)} layers with experts that can be replayed; leave out engine.return_routed_experts"
            )
        if (highest := int(experts_BTLK.max())) >= self._count:
            raise DataError(
                f"the samples name expert {highest}, and the policy ({self._name}) has {self._count} in a layer"
            )

    def _before(self, number: int) -> Callable[..., None]:
        def before(*_: object) -> None:
            if self._experts_BTLK is not None:
                experts_NK = self._experts_BTLK[:, :, number].flatten(0, 1).long()
                self._active[number] = _Choice(experts_NK, self._count)
                self._active[number].__enter__()  # type: ignore[no-untyped-call]

        return before

    def _after(self, number: int) -> Callable[..., None]:
        def after(*_: object) -> None:
            choice = self._active.pop(number, None)
            if choice is not None:
                choice.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self._made[number] = choice.made

        return after
