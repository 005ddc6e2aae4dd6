"""Codex: parallel calls, and a compaction when the conversation is long."""

from collections.abc import Mapping, Sequence

from tests.gateway.agents.scenario import Place, Scenario
from tests.gateway.qwen import answered, call, last_question, said_in, turn

TASK = "Run some commands."
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
    if "CONTEXT CHECKPOINT COMPACTION" in last_question(said):
        return turn(SUMMARY)
    if SUMMARY in last_question(said):
        return turn("Done after the summary.") if answered(said) else turn("", shell("echo héllo-again"))
    if not answered(said):
        return turn("Let me run them.", *(shell(f"echo héllo-{i}") for i in range(3)))
    return turn("Now a long one.", shell("seq 1 3000"))


def shell(command: str) -> str:
    return call("exec_command", cmd=command)


def commands(place: Place) -> Sequence[Sequence[str]]:
    return [[place.command("codex"), "exec", "--skip-git-repo-check", TASK]]


def environment(place: Place) -> Mapping[str, str]:
    return {"OPENAI_API_KEY": place.opened.api_key}


def files(place: Place) -> Mapping[str, str]:
    return {".codex/config.toml": CONFIG.format(base_url=place.opened.base_url, limit=15000)}


SCENARIO = Scenario(script, commands, environment, files)
