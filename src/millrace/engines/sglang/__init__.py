"""Stock SGLang: its adapter, its launch, and what must never be sent to it."""
