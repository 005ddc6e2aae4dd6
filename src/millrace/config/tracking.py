"""The settings of what shows a run elsewhere: experiment trackers, and traces (docs/monitoring.md)."""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator

from millrace.config.base import Model

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrackersConfig(Model):
    """The experiment trackers that record a run. Each needs the extra of its name, as in `millrace[wandb]`.

    A tracker that fails ends no run. wandb's, MLflow's and Trackio's own environment variables hold.
    """

    kinds: tuple[TrackerName, ...] = ()
    """The trackers. Empty is none."""
    project: Annotated[str, Field(min_length=1)] | None = None
    """The project at wandb and Trackio, and the experiment at MLflow. None takes it from WANDB_PROJECT or
    MLFLOW_EXPERIMENT_NAME; without them it is `millrace`. TensorBoard has none."""

    @field_validator("kinds")
    @classmethod
    def _check(cls, kinds: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
        if twice := [kind for kind in get_args(TrackerName) if kinds.count(kind) > 1]:
            raise ValueError(f"{twice[0]} is named twice")
        return kinds


def by_kinds(value: Any) -> Any:
    """Expand the short forms `trackers: [wandb]` and `trackers: wandb` to `trackers: {kinds: [wandb]}`."""
    if isinstance(value, str):
        value = [value]
    return {"kinds": value} if isinstance(value, list | tuple) else value


Trackers = Annotated[TrackersConfig, BeforeValidator(by_kinds)]


class TracingConfig(Model):
    """Traces of samples and publishes, which OpenTelemetry's SDK sends by OTLP over HTTP. They need `millrace[otel]`.

    The SDK's own environment variables hold, such as OTEL_EXPORTER_OTLP_HEADERS for keys, OTEL_SERVICE_NAME and
    OTEL_RESOURCE_ATTRIBUTES.
    """

    endpoint: str | None = None
    """URL of the collector, to which /v1/traces is added, such as http://127.0.0.1:4318. None takes it from
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT; without them it is http://localhost:4318."""
    ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the samples that are traced. Publishes are all traced."""

    @field_validator("endpoint")
    @classmethod
    def _check(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not re.fullmatch(r"https?://[^\s/]+\S*", endpoint):
            raise ValueError("it must be the URL of a collector, such as http://127.0.0.1:4318")
        return endpoint
