"""NIXL under the name by which vLLM imports it. The package of that name only chooses among builds for GPUs."""
