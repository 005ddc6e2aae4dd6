"""Supervised conversations for the warm-up, which teach the format but mostly the wrong operators.

They use the chat format of the rollouts, so they have the same token layout. Their tool calls have the numbers of the
problem in the right order, but most operators other than + are wrong (`make_misread_story`). So a model that imitates
them solves few problems, and reinforcement has to find the right operators.
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
    """A conversation to imitate.

    token_ids: [T]. loss_mask: [T] bool, True for the tokens to learn: the model's turns, end-of-turn token included.
    """

    token_ids: tuple[int, ...]
    loss_mask: NDArray[np.bool_]


def warmup_conversations(chat: ChatFormat, seed: int, start: int, count: int) -> Iterator[SupervisedConversation]:
    """Yield the conversations from `start` to `start + count` of the endless stream `seed`."""
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
        loss_mask = np.repeat([trained for _, trained in parts], [len(ids) for ids, _ in parts])
        yield SupervisedConversation(token_ids, loss_mask)
