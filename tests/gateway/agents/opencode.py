"""opencode: parallel calls and a sub-agent."""

import json
from collections.abc import Mapping, Sequence

from tests.gateway.agents.scenario import DELEGATE, SHELL, Place, Scenario, shell_and_sub_agent
from tests.gateway.qwen import call

SUB_AGENT = call("task", description="sub", prompt="SUBTASK: run it.", subagent_type="general")


def shell(word: str) -> str:
    return call("bash", command=f"echo héllo-{word}", description="Says hello")


def commands(place: Place) -> Sequence[Sequence[str]]:
    head = [place.command("opencode"), "run"]
    return [[*head, "--title", "Commands", SHELL], [*head, "-c", DELEGATE]]


def environment(place: Place) -> Mapping[str, str]:
    return {
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    }


def files(place: Place) -> Mapping[str, str]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{place.opened.base_url}/v1", "apiKey": place.opened.api_key},
        "models": {"policy": {"limit": {"context": 32000, "output": 4000}}},
    }
    settings = {"model": "millrace/policy", "small_model": "millrace/policy", "provider": {"millrace": provider}}
    return {".config/opencode/opencode.json": json.dumps({**settings, "autoupdate": False, "share": "disabled"})}


SCENARIO = Scenario(shell_and_sub_agent(shell, SUB_AGENT), commands, environment, files)
