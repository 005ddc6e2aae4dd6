"""Episodes as sequences of tokens to train on."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from millrace.continuation import joined_experts
from millrace.gateway.tree import BranchReason, Line, Tree, lines
from millrace.rollout.sample import Episode, EpisodeEnd
from millrace.types import FinishReason, VersionSpan


@dataclass(frozen=True, slots=True)
class GatewaySample:
    """One path through an episode's tree, from a first prompt to a last answer.

    episode: its tokens; the loss mask has each sampled token in one sample of the episode only. nodes: the numbers of
    its generations. reasons: why generations branch, by their numbers. superseded: whether the agent asked for the last
    answer again and went on from the other one; its answer was probably lost. finish: of each generation.
    temperatures: with which each generation was sampled.
    """

    episode: Episode
    nodes: tuple[int, ...]
    reasons: Mapping[int, BranchReason]
    superseded: bool
    finish: tuple[FinishReason, ...]
    temperatures: tuple[float, ...]


def samples_of(tree: Tree) -> list[GatewaySample]:
    """Return the samples of an episode, in the order in which their last answers ended, but superseded ones last."""
    return [_sample(line) for line in lines(tree)]


def _sample(line: Line) -> GatewaySample:
    total = sum(len(node.context_ids) + len(node.output_ids) for node in line.nodes)
    loss_mask, logprobs = np.zeros(total, np.bool_), np.zeros(total, np.float32)
    spans: list[VersionSpan] = []
    place = 0
    for node in line.nodes:
        place += len(node.context_ids)
        end = place + len(node.output_ids)
        if node.number in line.trained:
            loss_mask[place:end] = True
            logprobs[place:end] = node.logprobs
            spans.extend(VersionSpan(s.version, s.start + place, s.end + place) for s in node.version_spans)
        place = end
    messages = tuple(message for node in line.nodes for message in (*node.added, node.turn.message))
    last = line.nodes[-1]
    episode = Episode(
        last.token_ids,
        loss_mask,
        logprobs,
        tuple(spans),
        turns=len(line.trained),
        end=EpisodeEnd.TOKEN_LIMIT if last.finish is FinishReason.LENGTH else EpisodeEnd.ANSWERED,
        messages=messages,
        images=tuple(image for node in line.nodes for image in node.images),
        routed_experts=joined_experts(node.routed_experts for node in line.nodes),
    )
    return GatewaySample(
        episode,
        tuple(node.number for node in line.nodes),
        line.reasons,
        line.superseded,
        tuple(node.finish for node in line.nodes),
        tuple(node.temperature for node in line.nodes),
    )
