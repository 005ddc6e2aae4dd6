"""How much a vLLM server has to do, from what it tells Prometheus. Pure."""

from collections import defaultdict
from collections.abc import Mapping


def read_metrics(text: str) -> Mapping[str, float]:
    """The sum of each metric over its labels, by its name without `vllm:`. Names that are not vLLM's are left out."""
    sums: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if line.startswith("vllm:"):
            name, _, value = line.removeprefix("vllm:").rpartition(" ")
            sums[name.partition("{")[0]] += float(value)
    return sums
