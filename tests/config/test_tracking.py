"""The settings of trackers and traces."""

from pathlib import Path

import pytest

from millrace.config import dump_config, load_config
from millrace.config.tracking import TracingConfig, TrackersConfig
from millrace.errors import ConfigError
from tests.config.test_loading import VALID


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    return path


def test_without_settings_nothing_is_recorded_or_traced(path: Path) -> None:
    config = load_config(path)
    assert (config.trackers.kinds, config.tracing) == ((), None)


@pytest.mark.parametrize("given", ["wandb", "[wandb]", "{kinds: [wandb]}"])
def test_a_name_or_a_list_is_enough(path: Path, given: str) -> None:
    config = load_config(path, [f"trackers={given}"])
    assert config.trackers == TrackersConfig(kinds=("wandb",))
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_an_empty_section_turns_traces_on(path: Path) -> None:
    assert load_config(path, ["tracing={}"]).tracing == TracingConfig(endpoint=None, ratio=0.1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("trackers=[wanbd]", "trackers.kinds.0: .*'wandb'.* \\(it is 'wanbd'\\)"),
        ("trackers=[mlflow, wandb, mlflow]", "trackers.kinds: mlflow is named twice"),
        ("trackers={kind: [wandb]}", "unknown setting trackers.kind; did you mean 'kinds'"),
        ("tracing.endpoint=localhost:4318", "tracing.endpoint: it must be the URL of a collector, such as http://"),
        ("tracing.ratio=10", "tracing.ratio: .*less than or equal to 1"),
    ],
)
def test_a_mistake_says_what_is_valid(path: Path, given: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(path, [given])
