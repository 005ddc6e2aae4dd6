"""Supervised conversations that teach the format, by a teacher who reads poorly.

They come out of the same chat format as the rollouts, so their token layout is that of a rollout. The numbers in their
calls are those of the problem, in the right order; but the operators are mostly wrong wherever a story does not add
(`make_misread_story`), so a greedy pupil is right on few problems. What the stories really need is left to the
reinforcement.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millrace.rollout.chat import ChatFormat
from millrace.rollout.problems import make_misread_story
from millrace.train.tiny import ANSWER_TEXT, CALL_TEXT


@dataclass(frozen=True, slots=True)
class SupervisedConversation:
    """token_ids: [T]. loss_mask: [T] bool, True on the tokens to learn: the model's turns, end-of-turn included."""

    token_ids: tuple[int, ...]
    loss_mask: NDArray[np.bool_]


def warmup_conversations(chat: ChatFormat, seed: int, start: int, count: int) -> Iterator[SupervisedConversation]:
    """The conversations `start` to `start + count` of the endless stream `seed`, in the format of the rollouts."""
    for index in range(start, start + count):
        story = make_misread_story(seed, index)
        parts: list[tuple[tuple[int, ...], bool]] = [(chat.prompt(story.question), False)]
        left = story.numbers[0]
        steps = zip(story.clauses, story.operators, story.numbers[1:], story.results(), strict=True)
        for clause, operator, number, result in steps:
            call = CALL_TEXT.format(clause=clause, operator=operator, left=left, right=number)
            parts += [(chat.turn(call), True), (chat.continuation([str(result)]), False)]
            left = result
        parts.append((chat.turn(ANSWER_TEXT.format(answer=left)), True))
        token_ids = tuple(token for ids, _ in parts for token in ids)
        yield SupervisedConversation(token_ids, np.repeat([made for _, made in parts], [len(ids) for ids, _ in parts]))
