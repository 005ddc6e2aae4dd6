"""Tasks of verifiers as samples of `millrace train` that are played through the gateway (docs/agent_tasks.md).

    python -m millrace.integrations.verifiers tasks ENV.yaml [--limit N] > tasks.jsonl
    python -m millrace.integrations.verifiers episode ENV.yaml

ENV.yaml is verifiers' `env` section. `tasks` prints a row of data for each task. `episode` is the command of an agent.
It plays the task of `row.json`: verifiers relays the requests of its harness to the sample's episode, in the harness's
own protocol. It writes the reward of verifiers to `reward.json`. Its exit status is 0 if verifiers recorded no error;
otherwise it is 1, and the last line of its output says what failed.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from millrace.integrations.one_sample import TERMINATED, failed, row_of_sample, until_terminated, write_reward
from millrace.rollout.adapters.verifiers import environment_settings, error_of, reward_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m millrace.integrations.verifiers")
    actions = parser.add_subparsers(dest="action", required=True)
    tasks = actions.add_parser("tasks", help="print a row of data for each task")
    tasks.add_argument("--limit", type=int, help="the most tasks to print")
    episode = actions.add_parser("episode", help="play the task of row.json")
    for action in (tasks, episode):
        action.add_argument("environment", type=Path, metavar="ENV.yaml", help="verifiers' env section")
    given = parser.parse_args(arguments)
    try:
        environment = load(given.environment)
        if given.action == "tasks":
            print("".join(f"{json.dumps(row)}\n" for row in rows_of(environment, given.limit)), end="")
            return 0
        return asyncio.run(until_terminated(play(environment, row_of_sample()["task"])))
    except asyncio.CancelledError:
        return TERMINATED
    except Exception as error:  # the environment's code may raise anything
        return failed("verifiers", type(error).__name__, str(error))


def load(path: Path) -> Any:
    """Return the environment of a file. Raises ValueError if the file does not name a taskset."""
    import verifiers.v1 as vf
    import yaml

    given = yaml.safe_load(path.read_text())
    taskset = given.get("taskset", {}).get("id") if isinstance(given, dict) else None
    if not taskset:
        raise ValueError(f"{path} has no taskset.id, the id of an installed taskset")
    return vf.load_environment(vf.resolve_env_config(environment_settings(taskset, given)))


def rows_of(environment: Any, limit: int | None) -> Iterator[dict[str, Any]]:
    """Yield a row for each task. Raises ValueError if they have no end and there is no limit."""
    import verifiers.v1 as vf

    view = environment.taskset.select(vf.SelectConfig(limit=limit))
    if not view.bounded:
        raise ValueError("the tasks of this taskset have no end; give --limit")
    for task in view:
        yield {"task": task.data.idx, "name": task.data.id or task.data.name}


async def play(environment: Any, idx: int) -> int:
    """Play a task, write its reward, and return the exit status."""
    import verifiers.v1 as vf

    chosen = list(environment.taskset.select(vf.SelectConfig(include={"idx": [idx]})))
    if not chosen:
        raise ValueError(f"the taskset has no task {idx}")
    # The URL has the episode's secret. The variable's default is the key of a hosted service.
    client = vf.EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")
    async with environment.serving():
        episode = await environment.run_episode(chosen[0], vf.ModelContext(model="policy", client=client))
    if (error := error_of(episode, episode.traces)) is not None:
        return failed("verifiers", *error)
    write_reward(*reward_of(episode.traces))
    return 0


if __name__ == "__main__":
    sys.exit(main())
