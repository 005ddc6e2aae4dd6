"""Codex: parallel calls, a compaction when the conversation is long, and a sub-agent."""

import json
from collections.abc import Mapping, Sequence

from tests.gateway.agents.scenario import Place, Scenario
from tests.gateway.qwen import Said, answered, call, last_question, said_in, turn

TASK = "Run some commands."
DELEGATE = "Let an agent work."
SUMMARY = "Three commands were run, and each of them said hello to somebody."
CONFIG = """
model = "policy"
model_provider = "millrace"
model_context_window = 32000
model_auto_compact_token_limit = {limit}
check_for_update_on_startup = false
approval_policy = "never"
sandbox_mode = "danger-full-access"

[model_providers.millrace]
name = "Millrace"
base_url = "{base_url}/v1"
env_key = "OPENAI_API_KEY"
wire_api = "responses"

[analytics]
enabled = false

[features]
plugins = false
"""


def script(prompt: str) -> str:
    """What the model writes."""
    said = said_in(prompt)
    if "SUBTASK" in last_question(said):
        return turn("It said so.") if answered(said) else turn("", shell("echo héllo-sub"))
    if any(DELEGATE in one.text for one in said if one.role == "user"):
        return delegating(said)
    if "CONTEXT CHECKPOINT COMPACTION" in last_question(said):
        return turn(SUMMARY)
    if SUMMARY in last_question(said):
        return turn("Done after the summary.") if answered(said) else turn("", shell("echo héllo-again"))
    if not answered(said):
        return turn("Let me run them.", *(shell(f"echo héllo-{i}") for i in range(3)))
    return turn("Now a long one.", shell("seq 1 3000"))


def delegating(said: Sequence[Said]) -> str:
    """What the model writes to start a sub-agent and to wait for it. Its tools are in a namespace."""
    results = [one.text for one in said if one.role == "tool"]
    if not results:
        return turn("", call("multi_agent_v1__spawn_agent", message="SUBTASK: run it."))
    if len(results) == 1:
        return turn("", call("multi_agent_v1__wait_agent", targets=[json.loads(results[0])["agent_id"]]))
    return turn(f"The agent: {'It said so.' in results[1]}.")


def shell(command: str) -> str:
    return call("exec_command", cmd=command)


def commands(place: Place) -> Sequence[Sequence[str]]:
    head = [place.command("codex"), "exec", "--skip-git-repo-check"]
    return [[*head, TASK], [*head, DELEGATE]]


def environment(place: Place) -> Mapping[str, str]:
    return {"OPENAI_API_KEY": place.opened.api_key}


def files(place: Place) -> Mapping[str, str]:
    return {".codex/config.toml": CONFIG.format(base_url=place.opened.base_url, limit=15000)}


SCENARIO = Scenario(script, commands, environment, files)
