"""Stock SGLang: adapter, launch, and checks of what must never be sent to it."""
