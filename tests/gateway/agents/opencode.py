"""opencode: parallel calls and a sub-agent."""

import json
from collections.abc import Mapping, Sequence

from tests.gateway.agents.scenario import Place, Scenario
from tests.gateway.qwen import answered, call, last_question, results, said_in, turn

SHELL = "Run three commands."
DELEGATE = "Let an agent work."


def script(prompt: str) -> str:
    """What the model writes."""
    said = said_in(prompt)
    last, done = last_question(said), answered(said)
    if "SUBTASK" in last:
        return turn("It said so.") if done else turn("", shell("sub"))
    if DELEGATE in last and not done:
        return turn("", call("task", description="sub", prompt="SUBTASK: run it.", subagent_type="general"))
    if SHELL in last and not done:
        return turn("Let me run them.", *(shell(str(i)) for i in range(3)))
    return turn(f"Done after {results(said)} results.")


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


SCENARIO = Scenario(script, commands, environment, files)
