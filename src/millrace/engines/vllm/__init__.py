"""Stock vLLM: adapter, launch, and the extension that vLLM's processes load."""
