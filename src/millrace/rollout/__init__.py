"""Rollouts: samples of problems, by a model with its tools, rewards and environments.

The names here are those that the user's own rewards, tools, environments and loops import. They load neither torch nor
transformers.
"""

from millrace.rollout.sample import Episode, EpisodeEnd, Group, Message, Problem, Sample, SampleStatus
from millrace.rollout.step import Action, Step
from millrace.rollout.tools import Tool, ToolCall, ToolError

__all__ = [
    "Action",
    "Episode",
    "EpisodeEnd",
    "Group",
    "Message",
    "Problem",
    "Sample",
    "SampleStatus",
    "Step",
    "Tool",
    "ToolCall",
    "ToolError",
]
