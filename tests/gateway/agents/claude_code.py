"""Claude Code: three parallel calls, two sub-agents and `/compact`, in one conversation."""

from collections.abc import Mapping, Sequence

from tests.gateway.agents.scenario import Place, Scenario
from tests.gateway.qwen import answered, call, last_question, results, said_in, turn

SHELL = "Run three commands."
DELEGATE = "Let two agents work."
SUMMARY = "Three commands and two agents said hello to somebody."


def script(prompt: str) -> str:
    """What the model writes."""
    said = said_in(prompt)
    last, done = last_question(said), answered(said)
    if "SUBTASK" in last:
        return turn("It said so.") if done else turn("", shell("echo héllo-sub"))
    if "<analysis> block" in last:
        return turn(f"<analysis>\nIt is short.\n</analysis>\n<summary>\n{SUMMARY}\n</summary>")
    if DELEGATE in last and not done:
        return turn("", *(call("Agent", description="sub", prompt=f"SUBTASK {i}: run it.") for i in range(2)))
    if SHELL in last and not done:
        return turn("Let me run them.", *(shell(f"echo héllo-{i}") for i in range(3)))
    return turn(f"Done after {results(said)} results.")


def shell(command: str) -> str:
    return call("Bash", command=command, description="Says hello")


def commands(place: Place) -> Sequence[Sequence[str]]:
    head = [place.command("claude"), "--allowedTools", "Bash,Agent"]
    return [
        [*head, "-p", SHELL],
        [*head, "-c", "-p", DELEGATE],
        [*head, "-c", "-p", "/compact"],
        [*head, "-c", "-p", "Go on."],
    ]


def environment(place: Place) -> Mapping[str, str]:
    return {
        "ANTHROPIC_BASE_URL": place.opened.base_url,
        "ANTHROPIC_API_KEY": place.opened.api_key,
        "ANTHROPIC_MODEL": "policy",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


SCENARIO = Scenario(script, commands, environment)
