"""Tasks of Harbor as samples of `millrace train` (docs/agent_tasks.md). It runs in a Python with Harbor, 3.12 or newer.

    python -m millrace.integrations.harbor tasks FOLDER [FOLDER ...] > tasks.jsonl
    python -m millrace.integrations.harbor trial TRIAL.yaml [--gateway HOST_OR_URL]

`tasks` prints a row of data for each task: of a folder, or of the folders in it. `trial` is the command of an agent. It
runs one trial of the task in `row.json`, with the settings of TRIAL.yaml, and writes the verifier's reward to
`reward.json`. Its exit status is 0 if Harbor recorded no error; otherwise it is 1, and the last line of its output says
what failed.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from millrace.integrations.one_sample import TERMINATED, failed, row_of_sample, until_terminated, write_reward

BASE_URLS = ("OPENAI_BASE_URL", "OPENAI_API_BASE", "ANTHROPIC_BASE_URL")
PROTOCOLS = ("openai", "anthropic")  # the providers whose protocols the gateway speaks
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HARBOR_TELEMETRY": "0"}  # neither looks anything up
TRIALS = "trial"  # the folder, in the sample's, for what Harbor writes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m millrace.integrations.harbor")
    actions = parser.add_subparsers(dest="action", required=True)
    tasks = actions.add_parser("tasks", help="print a row of data for each task")
    tasks.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a task, or a folder of tasks")
    trial = actions.add_parser("trial", help="run a trial of the task in row.json")
    trial.add_argument("settings", type=Path, metavar="TRIAL.yaml", help="Harbor's trial config, without a task")
    trial.add_argument("--gateway", help="how agents in containers reach the gateway: a host, or a URL")
    given = parser.parse_args(arguments)
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    try:
        if given.action == "tasks":
            print("".join(f"{json.dumps({'task': str(task)})}\n" for task in tasks_in(given.folders)), end="")
            return 0
        return asyncio.run(play(settings_of(given.settings, row_of_sample()["task"]), given.gateway))
    except asyncio.CancelledError:
        return TERMINATED
    except Exception as error:  # Harbor's code, and that of its tasks' authors, may raise anything
        return failed("harbor", type(error).__name__, str(error))


def tasks_in(folders: Sequence[Path]) -> list[Path]:
    """Return the absolute paths of the tasks in the folders. Raises FileNotFoundError if a folder has none."""
    found: list[Path] = []
    for folder in folders:
        configs = [*folder.glob("task.toml"), *sorted(folder.glob("*/task.toml"))]
        if not configs:
            raise FileNotFoundError(f"neither {folder} nor a folder in it has a task.toml")
        found += [config.parent.absolute() for config in configs]
    return found


def settings_of(trial: Path, task: str | Mapping[str, object]) -> Any:
    """Return Harbor's TrialConfig. trial: the file with the settings. task: the path of a task, or Harbor's settings of
    one. Raises ValueError."""
    import yaml
    from harbor.models.trial.config import TrialConfig

    own = {"task": {"path": task} if isinstance(task, str) else task, "trials_dir": TRIALS}
    return TrialConfig.model_validate({**(yaml.safe_load(trial.read_text()) or {}), **own})


async def play(config: Any, gateway: str | None) -> int:
    """Run a trial (Harbor's TrialConfig), write its reward, and return the exit status."""
    from harbor.trial.trial import Trial

    point_to_gateway(config.agent, gateway)
    trial = await Trial.create(config)
    try:
        return finish(await until_terminated(trial.run()))
    finally:
        # Harbor protects the stop of an environment from the cancellation, and does not always wait for it.
        stops = [one for one in asyncio.all_tasks() if getattr(one.get_coro(), "__name__", "") == "stop"]
        await asyncio.gather(*stops, return_exceptions=True)


def point_to_gateway(agent: Any, gateway: str | None) -> None:
    """Point Harbor's agent (its settings) to the episode, whose URLs and keys are in this process's environment.

    gateway: how the environment of an agent that runs in there reaches it; see `reached_through`.
    """
    from harbor.agents.factory import AgentFactory
    from harbor.agents.installed.base import BaseInstalledAgent

    kind = AgentFactory.get_agent_class_from_config(agent)
    if agent.model_name is None:
        provider = getattr(kind.MODEL_CONNECTION, "default_provider", None)
        agent.model_name = f"{provider if provider in PROTOCOLS else 'openai'}/policy"
    if gateway is not None and issubclass(kind, BaseInstalledAgent):
        for name in BASE_URLS:
            os.environ[name] = reached_through(gateway, os.environ[name])


def reached_through(gateway: str, url: str) -> str:
    """Return an episode's URL through another host, which keeps scheme and port, or another URL, whose path comes
    before the episode's."""
    inner = urlsplit(url)
    outer = urlsplit(gateway if "://" in gateway else f"{inner.scheme}://{gateway}:{inner.port}")
    return urlunsplit((outer.scheme, outer.netloc, outer.path.rstrip("/") + inner.path, "", ""))


def finish(result: Any) -> int:
    """Write the reward of a trial (Harbor's TrialResult), if there is one that counts, and return the exit status."""
    if result.reward_valid:
        write_reward(*reward_of(result.verifier_result.rewards))
    if errors := result.recorded_exceptions():
        return failed("harbor", errors[0].exception_type, errors[0].exception_message)
    return 0 if result.reward_valid else failed("harbor", "no reward", "the verifier gave none")


def reward_of(rewards: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the reward and its parts, from a verifier's rewards by name. Raises ValueError if none is the reward."""
    parts = {name: float(value) for name, value in rewards.items()}
    if len(parts) > 1 and "reward" not in parts:
        raise ValueError(f"the verifier gave several rewards ({', '.join(parts)}), and none is named `reward`")
    return parts.get("reward", next(iter(parts.values()))), parts


if __name__ == "__main__":
    sys.exit(main())
