"""Stock vLLM: its adapter, its launch, and what is loaded into its processes."""
