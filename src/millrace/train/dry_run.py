"""What `millrace train --dry-run` looks at: the task and the chat template, without an engine or weights."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from millrace.config.engines import EmbeddedEngineConfig
from millrace.config.models import RunConfig
from millrace.config.sources import PretrainedModelConfig
from millrace.errors import DataError
from millrace.model_config import context_length
from millrace.rollout.chat import ChatFormat
from millrace.rollout.sample import Problem, images_in
from millrace.train.agents import agent_format
from millrace.train.task import Task, load_task, prompt_length, task_chat_format, with_servers
from millrace.train.tiny import make_tiny_tokenizer
from millrace.train.trackers.recorder import require_trackers


async def look(config: RunConfig) -> list[str]:
    """Load the data and the user's code, check what can be checked before a run, and return what was found, in lines.

    Nothing of the user's code runs but its imports. MCP servers are asked for their tools. Raises ConfigError or
    DataError as the run would.
    """
    require_trackers(config)
    async with with_servers(load_task(config), config) as task:
        pass
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config.model, PretrainedModelConfig):
            model = config.model.path
        else:
            make_tiny_tokenizer().save_pretrained(folder)
            model = folder
        chat = task_chat_format(config, task, model)
        agent_format(config, model)
        limit, why = _most_tokens(config, model)
    return [
        f"data: {_problems(task.problems, task, chat, limit, why)}",
        f"evaluation: {_problems(task.held_out, task, chat, limit, why)}",
        *_code(task, config),
    ]


def _most_tokens(config: RunConfig, model: str) -> tuple[int, str]:
    """Return the most tokens of a sample, and the setting that says so. An engine's own limit may be lower."""
    limits = {config.rollout.max_sample_tokens: "rollout.max_sample_tokens"}
    if isinstance(config.engine, EmbeddedEngineConfig) and config.engine.context_length is not None:
        limits.setdefault(config.engine.context_length, "engine.context_length")
    if not isinstance(config.model, PretrainedModelConfig):
        limits.setdefault(config.model.context_length, "model.context_length")
    elif Path(model).is_dir() and (positions := context_length(Path(model))) is not None:
        limits.setdefault(positions, "the model's max_position_embeddings")
    return min(limits.items())


def _problems(problems: Sequence[Problem], task: Task, chat: ChatFormat, most: int, why: str) -> str:
    count = f"{len(problems)} problems"
    if task.environment is not None:
        return f"{count}; the environment makes the prompts"
    if task.agent is not None:
        return f"{count}; the agent makes the prompts"
    lengths = {problem.problem_id: prompt_length(problem, chat) for problem in problems}
    longest = max(lengths, key=lengths.__getitem__)
    if lengths[longest] >= most:
        raise DataError(
            f"the prompt of problem {longest} has {lengths[longest]} tokens and leaves no room for an answer: "
            f"{why} is {most}; drop the problem or raise the limit"
        )
    if images := sum(len(images_in(problem.messages)) for problem in problems):
        count += f" with {images} images"
    return f"{count}; the longest prompt, {longest}, has {lengths[longest]} of the {most} tokens of a sample"


def _code(task: Task, config: RunConfig) -> Iterator[str]:
    if (environment := task.environment) is not None:
        names = ", ".join(tool["function"]["name"] for tool in environment.tools) or "none"  # type: ignore[index]
        yield f"environment: {environment.where}; its tools: {names}"
        return
    if task.agent is not None and config.agent is not None:
        settings = config.agent.rewarded(functions=config.reward is not None)
        yield f"agent: {task.agent.where}, {settings.concurrency} at once"
        if settings.reward != "functions":
            yield f"reward: {settings.reward}"
            return
    functions = (f"{f.where} x {f.weight:g}{' (whole groups)' if f.batch else ''}" for f in task.rewards.functions)
    yield f"reward: {', '.join(functions)}"
    if task.agent is None:
        yield f"tools: {', '.join(task.tools) or 'none'}"
