"""qwen-code: parallel calls, a sub-agent, and a title for the session."""

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
        return turn("", call("agent", description="sub", prompt="SUBTASK: run it.", subagent_type="general-purpose"))
    if SHELL in last and not done:
        return turn("Let me run them.", *(shell(str(i)) for i in range(3)))
    return turn(f"Done after {results(said)} results.")


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
    return {
        ".qwen/settings.json": '{"privacy": {"usageStatisticsEnabled": false}, "general": {"disableAutoUpdate": true}}'
    }


SCENARIO = Scenario(script, commands, environment, files)
