"""Mistakes in a config, as people make them. Each ends in one message with the place, the reason and the fix."""

from pathlib import Path

import pytest

from millrace.config import RunConfig, dump_config, load_config
from millrace.config.engines import SGLangEngineConfig
from millrace.errors import ConfigError

VALID = """\
name: test
model: {kind: tiny}
engine:
  kind: embedded
  replicas: 2
data: {kind: generated, seed: 1, problems: 10}
rollout:
  groups_per_step: 4
  samples_per_group: 4
  max_turn_tokens: 40
  max_sample_tokens: 200
train:
  steps: 3
  lr: 1e-3
evaluation:
  data: {kind: generated, seed: 1, problems: 10}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    return path


def test_a_config_reads_and_prints_back_to_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["train.lr=1e-5", "mode=standalone", "rollout.max_staleness=2"])
    assert config.train.lr == 1e-5
    assert config.mode == "standalone"
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  replicas: 2", "  replica: 2", r"run.yaml:5: unknown setting engine.replica; did you mean 'replicas'\?"),
        ("  steps: 3", "  stepz: 3", "run.yaml:13: unknown setting train.stepz; did you mean 'steps'"),
        ("  steps: 3", "  steps: three", "run.yaml:13: train.steps: .*integer.*'three'"),
        ("  steps: 3", "  steps: -1", "run.yaml:13: train.steps: .*greater than 0"),
        ("  steps: 3\n", "", "run.yaml:12: the setting train.steps is missing"),
        ("kind: embedded", "kind: embeded", r"run.yaml:4: engine.kind: .*'embeded'.*did you mean 'embedded'\?"),
        ("  kind: embedded\n", "", "run.yaml:3: the setting engine.kind is missing; valid kinds: embedded, "),
        ("kind: tiny", "kind: huge", "run.yaml:2: model.kind: .*'huge'.*valid kinds: tiny, pretrained"),
        ("name: test", "name: 9.9", r"run.yaml:1: name: .*string \(it is 9.9\); put it in quotes"),
        ("max_turn_tokens: 40", "max_turn_tokens: 400", "max_turn_tokens is above"),
        (
            "  replicas: 2",
            "  replicas: 2\n  ports: [80]",
            "engine: ports names 1 ports for 2 replicas[^{]*$",
        ),
        ("name: test", "name: ../x", "run.yaml:1: name"),
        ("name: test", "name: [", "is not YAML"),
    ],
)
def test_a_mistake_names_its_line_its_reason_and_what_to_write(path: Path, old: str, new: str, says: str) -> None:
    assert old in VALID
    path.write_text(VALID.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        load_config(path)


def test_all_mistakes_are_reported_at_once(path: Path) -> None:
    path.write_text(VALID.replace("steps", "stepz").replace("groups_per_step", "groups"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) >= 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning=1", "override 'train.learning=1': unknown setting train.learning"),
        ("train.step=2", r"override 'train.step=2': unknown setting train.step; did you mean 'steps'\?"),
        ("engine.KIND=sglang", r"unknown setting engine.KIND; did you mean 'kind'\?"),
        ("engine.launch=pinned", r"engine.launch: it must be local, ray or slurm, or module:attribute .*'pinned'"),
        ("train.lr=fast", "override 'train.lr=fast': train.lr: .*number"),
        ("train.lr", "not of the form section.key=value"),
        ("name.x=1", "needs a section at name, which is a single value"),
        ("train.lr=[", "is not YAML"),
        (
            "engine.kind=sglagn",
            r"override 'engine.kind=sglagn': engine.kind: .*valid kinds: .*; did you mean 'sglang'\?",
        ),
        ("name=[a]", r"override 'name=\[a\]': name: .*string \(it is \['a'\]\)$"),
        ("name=", "override 'name=': name: .*string"),
    ],
)
def test_a_wrong_override_is_named(path: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(path, [override])


@pytest.mark.parametrize("text", ["9.9", "0.10", "1e3", "on", "007", "2026-01-01", "'9.9'"])
def test_an_override_of_a_text_is_taken_literally(path: Path, text: str) -> None:
    assert load_config(path, [f"name={text}"]).name == text.strip("'")


def test_overrides_of_texts_reach_every_place_that_has_one(path: Path) -> None:
    path.write_text(VALID.replace("kind: embedded", "kind: sglang"))
    config = load_config(path, ["engine.version=9.10", "engine.env.OMP=1", "engine.python=3", "engine.engine_args.x=1"])
    assert isinstance(config.engine, SGLangEngineConfig)
    assert (config.engine.version, config.engine.env, config.engine.python) == ("9.10", {"OMP": "1"}, Path("3"))
    assert config.engine.engine_args == {"x": 1}  # engine_args take numbers too


def test_a_refusal_of_a_later_check_names_its_place(path: Path) -> None:
    def check(config: RunConfig) -> None:
        raise ConfigError(f"train.lr is {config.train.lr}, and nobody likes it")

    with pytest.raises(ConfigError, match=r"run.yaml:14: train.lr is 0.001, and nobody likes it"):
        load_config(path, check=check)
    with pytest.raises(ConfigError, match=r"override 'train.lr=2': train.lr is 2.0, and nobody likes it"):
        load_config(path, ["train.lr=2"], check=check)


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml can't be read: No such file"):
        load_config(tmp_path / "none.yaml")
