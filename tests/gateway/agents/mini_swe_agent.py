"""mini-swe-agent: two commands, and the one that ends its work."""

from collections.abc import Mapping, Sequence

from tests.gateway.agents.scenario import Place, Scenario
from tests.gateway.qwen import call, results, said_in, turn


def script(prompt: str) -> str:
    """What the model writes."""
    if (done := results(said_in(prompt))) < 2:
        return turn(f"Step {done}.", call("bash", command=f"echo héllo-{done}"))
    return turn("Done.", call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && echo All said hello."))


def commands(place: Place) -> Sequence[Sequence[str]]:
    mini = str(place.installed / "mini-swe-agent" / "bin" / "mini")
    return [[mini, "-m", "openai/policy", "-t", "Run some commands.", "--yolo", "--exit-immediately"]]


def environment(place: Place) -> Mapping[str, str]:
    return {
        "OPENAI_API_BASE": f"{place.opened.base_url}/v1",
        "OPENAI_API_KEY": place.opened.api_key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "MSWEA_CONFIGURED": "true",
        "MSWEA_COST_TRACKING": "ignore_errors",
    }


SCENARIO = Scenario(script, commands, environment)
