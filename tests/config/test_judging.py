"""Settings that a judge can't have are refused at once."""

from pathlib import Path

import pytest

from millrace.config import dump_config, load_config
from millrace.errors import ConfigError

JUDGED = """\
name: test
model: {kind: tiny}
engine: {kind: embedded}
data: {kind: generated, seed: 1, problems: 10}
rollout: {groups_per_step: 4, samples_per_group: 4, max_turn_tokens: 40, max_sample_tokens: 200}
train: {steps: 3, lr: 1e-3}
evaluation: {data: {kind: generated, seed: 1, problems: 10}}
judges:
  mode: colocated
  model: {kind: pretrained, path: judge}
  engine: {kind: sglang, base_gpu_id: 1}
  weight: 0.5
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(JUDGED)
    return path


def test_a_judge_reads_and_prints_back_to_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ['judges.template="{answer} gives {{\\"grade\\": {reference}}}"'])
    assert config.judges is not None
    assert config.judges.template.format(answer="a", reference=1) == 'a gives {"grade": 1}'
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "mode=standalone",
            r"judges.mode colocated needs engines that sleep .* in mode standalone, set judges.mode standalone",
        ),
        ("rollout.dynamic_sampling=2", r"rollout.dynamic_sampling .* set judges.mode standalone"),
        ("judges.weight=0", r"judges.weight: .*greater than 0"),
        ("judges.modes=colocated", r"unknown setting judges.modes; did you mean 'mode'\?"),
        ("judges.engine.base_gpu=1", r"unknown setting judges.engine.base_gpu; did you mean 'base_gpu_id'\?"),
        ("judges.template=Is it {good}? {answer}", r"judges.template: it names \{good\}; it may name \{question\}"),
        ("judges.template='{question}'", r"judges.template: it does not name \{answer\}"),
        ("judges.template='{answer} as {grade'", r"judges.template: it is not a format string"),
        ("judges.template='{answer:d}'", r"judges.template: it can't be filled in"),
        ("judges.verdict=grade (", r"judges.verdict: it is not a regular expression"),
        ("judges.verdict=grade [0-9]", r"judges.verdict: it has 0 groups; it needs one"),
    ],
)
def test_settings_that_a_judge_can_not_have(path: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(path, [override])
