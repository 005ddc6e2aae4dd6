"""Real agents before the gateway, each in a namespace without a network: `make test-agents`."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gateway.agents.alone import AGENTS, ALONE, NEEDS_AGENTS
from tests.gateway.trained import assert_trained_once

pytestmark = NEEDS_AGENTS


@dataclass(frozen=True)
class Seen:
    """What an agent did, and what the gateway kept of it."""

    runs: list[dict[str, Any]]
    episode: dict[str, Any]
    samples: list[dict[str, Any]]
    asked: list[tuple[list[int], list[int]]]
    prompts: list[str]
    nodes: list[dict[str, Any]]
    looked_up: list[str]

    @property
    def reasons(self) -> Counter[str]:
        return Counter(node["reason"] for node in self.nodes if node["reason"])

    @property
    def dropped(self) -> set[str]:
        return {name for name in self.episode["counts"] if name.startswith("dropped:")}

    def outputs(self) -> list[str]:
        """The last lines of the commands, which must have ended well."""
        assert [run["status"] for run in self.runs] == [0] * len(self.runs), self.runs
        return [(run["output"].strip().splitlines() or [""])[-1] for run in self.runs]


def play(name: str, folder: Path) -> Seen:
    """Runs an agent with the scenario of this name."""
    (folder / "home").mkdir()
    command = [*ALONE, sys.executable, "-m", "tests.gateway.agents.serve", name, str(folder), str(AGENTS)]
    subprocess.run(command, check=True, timeout=800)
    seen = Seen(**json.loads((folder / "seen.json").read_bytes()))
    assert_trained_once(seen.samples, seen.asked)
    counts = seen.episode["counts"]
    assert (seen.episode["undelivered"], counts.get("malformed", 0), counts.get("retried", 0)) == (0, 0, 0)
    return seen


def test_claude_code(tmp_path: Path) -> None:
    """All four commands continue one conversation."""
    seen = play("claude_code", tmp_path)
    assert seen.outputs() == ["Done after 3 results.", "Done after 5 results.", "", "Done after 0 results."]
    agents = ["sub_agent", "sub_agent", None, None]  # between the turns of the agent that asked for them
    assert [node["reason"] for node in seen.nodes] == [None, None, None, *agents, None, "forked", "compacted"]
    assert len(seen.samples) == 5
    assert all(f"héllo-{i}" in seen.prompts[1] for i in range(3))
    assert seen.prompts[7].count("It said so.") == 2
    assert seen.dropped == {"dropped:context_management", "dropped:output_config.effort"}
    assert seen.looked_up == []


def test_codex(tmp_path: Path) -> None:
    seen = play("codex", tmp_path)
    assert seen.outputs() == ["Done after the summary.", "The agent: True."]
    assert [node["reason"] for node in seen.nodes][:6] == [None, None, None, "compacted", "compacted", None]
    assert seen.reasons == {
        "compacted": 2,
        "forked": 1,
        "sub_agent": 1,
    }  # the second command is a conversation of its own
    assert len(seen.samples) == 5
    assert all(f"héllo-{i}" in seen.prompts[1] for i in range(3))
    assert "héllo-again" in seen.prompts[5]
    assert seen.dropped == {"dropped:tool:web_search"}
    assert seen.looked_up == []


def test_qwen_code(tmp_path: Path) -> None:
    """It has no labels. Its sub-agent is told by its system prompt."""
    seen = play("qwen_code", tmp_path)
    assert seen.outputs() == ["Done after 3 results.", "Done after 4 results."]
    assert [node["reason"] for node in seen.nodes] == [None, None, None, "system_changed", None, None]
    assert sorted(tuple(sample["nodes"]) for sample in seen.samples) == [(0, 1, 2, 5), (3, 4)]
    assert "It said so." in seen.prompts[5]
    assert seen.dropped == set()


def test_opencode(tmp_path: Path) -> None:
    seen = play("opencode", tmp_path)
    assert seen.outputs() == ["Done after 3 results.", "Done after 4 results."]
    assert [node["reason"] for node in seen.nodes] == [None, None, None, "sub_agent", None, None]
    assert sorted(tuple(sample["nodes"]) for sample in seen.samples) == [(0, 1, 2, 5), (3, 4)]
    assert "It said so." in seen.prompts[5]
    assert seen.dropped == set()


def test_mini_swe_agent(tmp_path: Path) -> None:
    seen = play("mini_swe_agent", tmp_path)
    seen.outputs()
    assert "All said hello." in seen.runs[0]["output"]
    assert [sample["nodes"] for sample in seen.samples] == [[0, 1, 2]]
    assert all(f"héllo-{i}" in seen.prompts[2] for i in range(2))
    assert (seen.dropped, seen.looked_up) == (set(), [])
