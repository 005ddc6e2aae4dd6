"""qwen-code: parallel calls, a sub-agent, and a title for the session."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.gateway.agents.scenario import DELEGATE, SHELL, Place, Scenario, shell_and_sub_agent
from tests.gateway.qwen import call

SETTINGS = Path(__file__).parents[3] / "examples" / "cli_agents" / ".qwen" / "settings.json"
SUB_AGENT = call("agent", description="sub", prompt="SUBTASK: run it.", subagent_type="general-purpose")


def shell(word: str) -> str:
    return call("run_shell_command", command=f"echo héllo-{word}", description="Says hello", is_background=False)


def commands(place: Place) -> Sequence[Sequence[str]]:
    head = [place.command("qwen"), "--yolo"]
    return [[*head, "-p", SHELL], [*head, "-c", "-p", DELEGATE]]


def environment(place: Place) -> Mapping[str, str]:
    return {
        "OPENAI_BASE_URL": f"{place.opened.base_url}/v1",
        "OPENAI_API_KEY": place.opened.api_key,
        "OPENAI_MODEL": "policy",
    }


def files(_: Place) -> Mapping[str, str]:
    return {".qwen/settings.json": SETTINGS.read_text()}


SCENARIO = Scenario(shell_and_sub_agent(shell, SUB_AGENT), commands, environment, files)
