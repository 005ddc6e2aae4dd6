"""The task of a run: its problems, tools, rewards, environment and agent, loaded before anything starts."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from millrace.agents.job import Agent
from millrace.agents.player import load_agent
from millrace.config.models import RunConfig
from millrace.config.tasks import RewardConfig, ToolConfig
from millrace.errors import ConfigError, DataError
from millrace.rollout.calls import Calls
from millrace.rollout.chat import ChatFormat, load_chat_format, load_dialogue_format, load_prompt_format
from millrace.rollout.data import load_problems
from millrace.rollout.environment import EnvironmentKind, load_environment
from millrace.rollout.reward import require_number
from millrace.rollout.sample import Problem, images_in
from millrace.rollout.scoring import Rewards, load_rewards
from millrace.rollout.toolbox import ToolKind, by_name, load_tools
from millrace.train.agents import FOLDER

RULE = RewardConfig(path="millrace.rollout.reward", name="gsm8k")
CALCULATOR = ToolConfig(name="calculator")


@dataclass(frozen=True, slots=True)
class Task:
    """What the samples of a run work on, with what, and for which reward.

    environment: if there is one, it takes the place of tools and rewards. One that needs a server, or has tasks of its
    own, is not here before `with_servers`. calls: what calls the user's code. agent: if there is one, it takes the
    place of tools.
    """

    problems: Sequence[Problem]
    held_out: Sequence[Problem]
    tools: Mapping[str, ToolKind]
    rewards: Rewards
    environment: EnvironmentKind | None
    calls: Calls
    agent: Agent | None = None

    @property
    def schemas(self) -> list[Mapping[str, object]]:
        """The JSON schemas of the tools that the prompts describe."""
        if self.environment is not None:
            return list(self.environment.tools)
        return [tool.schema for tool in self.tools.values()]

    def share(self, rank: int, ranks: int) -> "Task":
        """Return the task with this rank's share of the problems."""
        share = slice(rank, None, ranks)
        return replace(self, problems=self.problems[share], held_out=self.held_out[share])


def load_task(config: RunConfig) -> Task:
    """Return the task of the settings, of which nothing runs yet.

    Raises ConfigError or DataError, in one line, if part of it can't be used.
    """
    calls, alone = Calls(), config.environment is None
    environment = None
    if config.environment is not None and config.environment.path is not None:
        environment = load_environment(config.environment, calls)
    agent, own_tools, functions = None, alone, alone
    if config.agent is not None:
        settings = config.agent.rewarded(functions=config.reward is not None)
        agent = load_agent(settings, config.output_dir / config.name / FOLDER)
        own_tools, functions = False, settings.reward == "functions"
    tools = config.rollout.tools if config.rollout.tools is not None else (CALCULATOR,) if own_tools else ()
    rewards = load_rewards(config.reward if config.reward is not None else (RULE,) if functions else (), calls)

    def check(problem: Problem) -> None:
        if rewards.by_rule:
            require_number(problem)
        if problem.answer is None and config.judges is not None and "{reference}" in config.judges.template:
            raise ValueError(
                "it has no answer, which judges.template asks for as {reference}; name its column in `answer:`, or "
                "give a template without it"
            )

    kinds = load_tools(tools, calls)
    optional = agent is not None
    problems = load_problems(config.data, prompts=alone, optional=optional, check=check)
    held_out = load_problems(config.evaluation.data, held_out=True, prompts=alone, optional=optional, check=check)
    for problem in (*problems, *held_out):
        if config.engine.kind == "embedded" and images_in(problem.messages):
            raise ConfigError(
                f"problem {problem.problem_id} has images, which the embedded engine does not take; set engine.kind to "
                "sglang or vllm"
            )
    return Task(problems, held_out[: config.evaluation.problems], kinds, rewards, environment, calls, agent)


@asynccontextmanager
async def with_servers(task: Task, config: RunConfig) -> AsyncIterator[Task]:
    """Yield the task with its environment and the tools of its MCP servers, which stay open in the block.

    Raises ConfigError if a server does not answer.
    """
    async with AsyncExitStack() as servers:
        if config.environment is not None and config.environment.openenv is not None:
            from millrace.rollout.adapters import openenv

            opening = openenv.opened(config.environment, task.calls)
            task = replace(task, environment=await servers.enter_async_context(opening))
        if config.environment is not None and config.environment.verifiers is not None:
            from millrace.rollout.adapters import verifiers

            selections = [data.select for data in (config.data, config.evaluation.data) if data.kind == "tasks"]
            opening_tasks = verifiers.opened(config.environment, task.calls, selections)
            environment, (problems, held_out) = await servers.enter_async_context(opening_tasks)
            held_out = held_out[: config.evaluation.problems]
            task = replace(task, environment=environment, problems=problems, held_out=held_out)
        if tools := [tool for tool in config.rollout.tools or () if tool.mcp is not None]:
            from millrace.rollout.adapters import mcp

            kinds = await servers.enter_async_context(mcp.served(tools))
            task = replace(task, tools=by_name([*task.tools.values(), *kinds]))
        yield task


def prompt_length(problem: Problem, chat: ChatFormat) -> int:
    """Return the number of tokens of a problem's prompt, as an engine reads it.

    Raises DataError, which names the problem, if the model's template refuses it, or it has images and the model reads
    none.
    """
    try:
        return len(chat.prompt_of(problem.messages)) + chat.added(images_in(problem.messages))
    except DataError as error:
        raise DataError(f"the prompt of problem {problem.problem_id}: {error}") from error


def task_chat_format(config: RunConfig, task: Task, model: str) -> ChatFormat:
    """Return the chat format of a model for a task. Raises DataError if the model's template can't write its turns.

    model: a folder or a name on the Hub. The warm-up needs tool calls even if the rollouts have no tools, and the
    calculator if an agent has it.
    """
    kwargs = config.rollout.chat_template_kwargs
    if task.agent is not None and config.warmup is not None:
        return load_chat_format(model, [tool.schema for tool in load_tools((CALCULATOR,), task.calls).values()], kwargs)
    if task.environment is not None:
        return load_dialogue_format(model, task.schemas, kwargs)
    if not task.tools and config.warmup is None:
        return load_prompt_format(model, kwargs)
    return load_chat_format(model, task.schemas, kwargs)
