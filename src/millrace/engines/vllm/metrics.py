"""Read a vLLM server's Prometheus metrics. Pure."""

from collections import defaultdict
from collections.abc import Mapping


def read_metrics(text: str) -> Mapping[str, float]:
    """Return the sum of each vLLM metric over its labels. Keys are the names without `vllm:`."""
    sums: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if line.startswith("vllm:"):
            name, _, value = line.removeprefix("vllm:").rpartition(" ")
            sums[name.partition("{")[0]] += float(value)
    return sums
