"""A run's settings: the pydantic models (`models`, `engines`, `routers`) and the loader (`loading`)."""

from millrace.config.engines import EmbeddedEngineConfig
from millrace.config.loading import dump_config, load_config
from millrace.config.models import RunConfig

__all__ = ["EmbeddedEngineConfig", "RunConfig", "dump_config", "load_config"]
