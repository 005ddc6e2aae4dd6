"""A run's settings: the pydantic models (`models`) and the loader (`loading`)."""

from millrace.config.loading import dump_config, load_config
from millrace.config.models import EmbeddedEngineConfig, RunConfig

__all__ = ["EmbeddedEngineConfig", "RunConfig", "dump_config", "load_config"]
