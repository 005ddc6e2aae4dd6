"""Compares what the layers hold with samples of the trainer's weights. See `millrace_audit`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from millrace_audit import Place, Sample, audited, read_samples
from millrace_boxes import box_of
from vllm.config import set_current_vllm_config

from .dry_run import View
from .messages import TensorSpec
from .plan import Plan


def audit(text: str, plan: Plan, config: Any) -> dict[str, Any]:
    """What the layers hold. text: the samples as JSON. Raises RpcError for a tensor that the model does not have."""
    samples = read_samples(text)
    specs = [TensorSpec(s.name, s.dtype, s.shape, 0, math.prod(s.shape) * s.dtype.itemsize) for s in samples]
    plan.targets(specs)  # all together, which is one dry run
    with set_current_vllm_config(config):
        answer: dict[str, Any] = audited(samples, lambda sample: places(sample, plan), plan.modules)
        return answer


def places(sample: Sample, plan: Plan) -> Sequence[Place]:
    """Where the model keeps a sent tensor; nothing if this rank does not have it, or its loader computes something."""
    [target] = plan.targets([TensorSpec(sample.name, sample.dtype, sample.shape, 0, 0)])
    found = []
    for region, origin in target.regions.items():
        if target.module is None or target.unplanned is not None or not isinstance(origin, View):
            continue
        box = box_of(sample.shape, origin.offset, region.sizes, origin.strides)
        form = plan.forms[target.module, region.name]
        if box is not None and form.dim() >= 2 and is_whole(form):
            found.append(Place(target.module, region.name, *box, region.offset, region.strides, tuple(form.shape)))
    return found


def is_whole(form: torch.Tensor) -> bool:
    """Whether a parameter is contiguous, so that places in its memory are rows and columns."""
    return form.is_contiguous()
