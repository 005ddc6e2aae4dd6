"""The settings of a task: shorthands, paths beside the config, and mistakes in lists of sections."""

from pathlib import Path

import pytest

from millrace.config import dump_config, load_config
from millrace.config.sources import FileDataConfig
from millrace.errors import ConfigError
from tests.config.test_loading import VALID


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "here" / "run.yaml"
    path.parent.mkdir()
    path.write_text(VALID)
    (path.parent / "own.py").touch()
    (path.parent / "rows.jsonl").touch()
    return path


@pytest.mark.parametrize(
    "reward", ["own.py:short", "{path: own.py, name: short}", "[own.py:short]", "[{path: own.py, name: short}]"]
)
def test_one_reward_has_many_forms(path: Path, reward: str) -> None:
    config = load_config(path, [f"reward={reward}"])
    assert config.reward is not None
    [one] = config.reward
    assert (one.path, one.name, one.weight) == (str(path.parent / "own.py"), "short", 1.0)


def test_files_are_looked_for_beside_the_config_and_printed_with_their_place(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["reward=[own.py:a, there.py:b, my.module:c]", "data={kind: file, path: rows.jsonl}"]
    config = load_config(path, [*overrides, "evaluation.data={kind: file, path: there.jsonl}"])
    assert config.reward is not None
    assert [one.path for one in config.reward] == [str(path.parent / "own.py"), "there.py", "my.module"]
    assert isinstance(config.data, FileDataConfig)
    assert isinstance(config.evaluation.data, FileDataConfig)
    assert config.data.path == path.parent / "rows.jsonl"
    assert config.evaluation.data.path == Path("there.jsonl")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_tools_have_many_forms_and_a_command_its_files(path: Path) -> None:
    forms = (
        "[calculator, own.py:search, {path: own.py, name: read, timeout: 5}, {mcp: {command: [python, own.py, -v]}}]"
    )
    tools = load_config(path, [f"rollout.tools={forms}"]).rollout.tools
    assert tools is not None
    own = str(path.parent / "own.py")
    assert [(tool.path, tool.name) for tool in tools] == [
        (None, "calculator"),
        (own, "search"),
        (own, "read"),
        (None, None),
    ]
    assert tools[2].timeout == 5
    assert tools[3].mcp is not None
    assert tools[3].mcp.command == ("python", own, "-v")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("reward=short", "reward.0: write it as file.py:name or package.module:name (it is 'short')"),
        ("reward=[]", "reward: Tuple should have at least 1 item"),
        ("reward=[{path: own.py, nam: short}]", "unknown setting reward.0.nam; did you mean 'name'?"),
        ("reward={path: own.py}", "the setting reward.0.name is missing"),
        ("reward={path: own.py, name: short, weight: .nan}", "reward.0.weight: Input should be a finite number"),
        (
            "rollout.tools=[{path: own.py}]",
            "rollout.tools.0: a tool has either a name, with or without a path, or",
        ),
        ("rollout.tools=[{mcp: {}}]", "rollout.tools.0.mcp: an MCP server has either a command or a url"),
        ("rollout.tools=[{name: a, tmeout: 3}]", "unknown setting rollout.tools.0.tmeout; did you mean 'timeout'?"),
        (
            "environment=own.py:G & reward=own.py:f",
            "reward can't be set together with environment: the environment gives",
        ),
        (
            "environment=own.py:G & data={kind: file, path: rows.jsonl, prompt: x}",
            "data.prompt can't be set together",
        ),
        (
            "environment=own.py:G & rollout.tools=[calculator]",
            "rollout.tools can't be set together with environment",
        ),
        (
            "environment={openenv: 'http://127.0.0.1:8000', verifiers: gsm8k}",
            "an environment is one of: path and name of a class, openenv, verifiers",
        ),
        ("environment={path: own.py}", "an environment is one of: path and name of a class, openenv, verifiers"),
        ("environment={openenv: '127.0.0.1:8000'}", "environment.openenv"),
        ("data={kind: file, path: rows.jsonl, promt: task}", "unknown setting data.promt; did you mean 'prompt'?"),
    ],
)
def test_mistakes(path: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(path, override.split(" & "))
    assert says in str(raised.value)
