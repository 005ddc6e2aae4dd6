"""Rollouts: samples of problems, by a model with its tools, rewards and environments.

The names here are those that the user's own rewards, tools, environments and loops import.
"""

from typing import TYPE_CHECKING

from millrace.lazy import exports

if TYPE_CHECKING:
    from millrace.rollout.agent import EpisodeLimits, converse, run_episode
    from millrace.rollout.chat import ChatFormat, load_chat_format, load_prompt_format
    from millrace.rollout.judge import Judge
    from millrace.rollout.runner import SampleRunner, ToolCounts
    from millrace.rollout.sample import Episode, EpisodeEnd, Group, Message, Problem, Sample, SampleStatus
    from millrace.rollout.scoring import Played, RewardFunction, Rewards
    from millrace.rollout.step import Action, Step
    from millrace.rollout.timings import Timings
    from millrace.rollout.tools import Calculator, Tool, ToolAnswer, ToolCall, ToolError

__getattr__, __dir__ = exports(
    __name__,
    {
        "millrace.rollout.agent": ["EpisodeLimits", "converse", "run_episode"],
        "millrace.rollout.chat": ["ChatFormat", "load_chat_format", "load_prompt_format"],
        "millrace.rollout.judge": ["Judge"],
        "millrace.rollout.runner": ["SampleRunner", "ToolCounts"],
        "millrace.rollout.sample": ["Episode", "EpisodeEnd", "Group", "Message", "Problem", "Sample", "SampleStatus"],
        "millrace.rollout.scoring": ["Played", "RewardFunction", "Rewards"],
        "millrace.rollout.step": ["Action", "Step"],
        "millrace.rollout.timings": ["Timings"],
        "millrace.rollout.tools": ["Calculator", "Tool", "ToolAnswer", "ToolCall", "ToolError"],
    },
)

__all__ = [
    "Action",
    "Calculator",
    "ChatFormat",
    "Episode",
    "EpisodeEnd",
    "EpisodeLimits",
    "Group",
    "Judge",
    "Message",
    "Played",
    "Problem",
    "RewardFunction",
    "Rewards",
    "Sample",
    "SampleRunner",
    "SampleStatus",
    "Step",
    "Timings",
    "Tool",
    "ToolAnswer",
    "ToolCall",
    "ToolCounts",
    "ToolError",
    "converse",
    "load_chat_format",
    "load_prompt_format",
    "run_episode",
]
