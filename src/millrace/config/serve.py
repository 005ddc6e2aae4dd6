"""The settings of `millrace serve`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from millrace.config.base import Model
from millrace.config.engines import EngineConfig
from millrace.config.gateway import GatewayConfig
from millrace.config.models import MetricsConfig, PublishConfig
from millrace.config.paths import LocalPath
from millrace.config.routers import RouterConfig, check_router
from millrace.config.sources import ModelConfig


class ServeConfig(Model):
    """A fleet of engines with the gateway for agents, without a trainer."""

    folder: LocalPath = Path("runs/serve")
    """Folder for the engines' logs and the gateway's key."""
    seed: int = 0
    """Seed of the engines."""
    model: ModelConfig
    """The model to serve."""
    engine: EngineConfig
    """The engines that generate."""
    gateway: GatewayConfig = GatewayConfig(port=8321)
    """The gateway. Its port is 8321 unless the section sets one."""
    chat_template_kwargs: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Keyword arguments of the chat template, such as `enable_thinking`."""
    publish: PublishConfig = PublishConfig()
    """How new weights reach the engines."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often in a row Millrace restarts an engine that died or hangs."""
    router: RouterConfig | None = None
    """An external router between the requests and the engines. None sends requests straight to the engines."""
    metrics: MetricsConfig | None = None
    """Metrics for Prometheus and `millrace status`. None is off."""

    @model_validator(mode="after")
    def _check(self) -> "ServeConfig":
        if self.router is not None:
            check_router(self.router, self.engine)
        return self
