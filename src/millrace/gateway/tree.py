"""The generations of one episode as a tree, in which a request attaches to the deepest node that it extends.

A node is one generation: the tokens that the request added to its parent's, and the tokens that were sampled. The tree
compares messages, not tokens. Sampled tokens are never made from text again.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from millrace.gateway.call import (
    NO_LINEAGE,
    Lineage,
    ModelCall,
    Tool,
    TurnText,
    extended,
    fingerprint,
    reasoning_of,
    text_of,
    tools_digest,
)
from millrace.rollout.sample import Message
from millrace.types import ExpertArray, FinishReason, Float32Array, VersionSpan

SHORTEST_SUMMARY = 20  # characters of its longest line


class BranchReason(StrEnum):
    """Why a generation does not simply continue the one before it."""

    RESAMPLED = "resampled"  # the same conversation was answered before
    FORKED = "forked"  # the agent went on from an earlier turn with other messages
    HISTORY_EDITED = "history_edited"  # a turn of the model was changed by the agent
    REASONING_CHANGED = "reasoning_changed"  # only the reasoning of a turn was changed
    TOOLS_CHANGED = "tools_changed"
    SYSTEM_CHANGED = "system_changed"  # another system prompt
    COMPACTED = "compacted"  # the agent replaced its history by a summary
    SUB_AGENT = "sub_agent"
    OTHER_CONVERSATION = "other_conversation"  # it has no turn in common with those before
    TEMPLATE_REWROTE = "template_rewrote"  # the chat template writes earlier turns in another way now
    NO_BRIDGE = "no_bridge"  # the format can't append these messages to the turn


@dataclass(slots=True)
class Node:
    """One generation.

    number: position in the episode's order. context_ids: [C] tokens between the parent's and the output; the whole
    prompt for a root. output_ids: [T]. logprobs: [T] float32. version_spans: positions in the output. added: the
    messages after the parent's turn; all for a root. reason: why it branches; None if it continues its parent.
    identity: of the request. request: its id, which the samples of one request share. delivered: whether the agent got
    the answer. images: of the messages in `added`. temperature: with which it was sampled. digest: of the conversation
    up to and including the turn. routed_experts: [N, L, K], as in `Generation`, from where those of the parent's path
    end.
    """

    number: int
    parent: "Node | None"
    tools: tuple[Tool, ...]
    added: tuple[Message, ...]
    context_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    logprobs: Float32Array
    version_spans: tuple[VersionSpan, ...]
    finish: FinishReason
    turn: TurnText
    identity: bytes
    request: str
    reason: BranchReason | None = None
    lineage: Lineage = NO_LINEAGE
    temperature: float = 1.0
    delivered: bool = False
    images: tuple[bytes, ...] = ()
    digest: bytes = b""
    routed_experts: ExpertArray | None = field(default=None, repr=False)
    children: "list[Node]" = field(default_factory=list)

    @property
    def path(self) -> "list[Node]":
        """The nodes from the root to this one."""
        nodes, node = [], self
        while True:
            nodes.append(node)
            if node.parent is None:
                return nodes[::-1]
            node = node.parent

    @property
    def routed(self) -> int:
        """How many tokens of the whole path have their routed experts."""
        return sum(len(node.routed_experts) for node in self.path if node.routed_experts is not None)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of the whole path."""
        tokens: list[int] = []
        for node in self.path:
            tokens += node.context_ids
            tokens += node.output_ids
        return tuple(tokens)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request attaches.

    parent: None for a new root. added: the messages after the parent's turn. reason: why it branches; None if it
    continues its parent, or is the first.
    """

    parent: Node | None
    added: tuple[Message, ...]
    reason: BranchReason | None


class Tree:
    """The generations of one episode, in the order in which they ended."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._ends: dict[bytes, list[Node]] = defaultdict(list)  # by digest of the conversation after the turn
        # By identity of the request, and the agent that its headers name: sub-agents may ask the same.
        self._asked: dict[tuple[bytes, str | None], list[Node]] = defaultdict(list)
        self._prompts: set[tuple[bytes, str | None]] = set()  # digests of the conversations before turns, and the agent

    def place(self, call: ModelCall) -> Place:
        """Return the deepest node whose conversation the request extends; of equal ones, one that the agent got."""
        for length in range(len(call.messages) - 1, 0, -1):
            ends = self._ends.get(call.prefixes[length], ())
            for node in sorted(ends, key=lambda one: (not one.delivered, -one.number)):
                if _same_reasoning(node, call.messages[:length]):
                    added = call.messages[length:]
                    return Place(node, added, self._reason(call, node, added))
        return Place(None, call.messages, self.why_new(call))

    def add(self, node: Node) -> Node:
        """Add a generation that has ended, and number it."""
        node.number = len(self.nodes)
        before = node.parent.digest if node.parent else tools_digest(node.tools)
        for message in node.added:
            before = extended(before, message)
        prompt = before, node.lineage.agent
        node.digest = extended(before, node.turn.message)
        if node.reason is None:  # another one may have ended since it was placed
            node.reason = self._late_reason(node, again=prompt in self._prompts)
        self._prompts.add(prompt)
        self.nodes.append(node)
        self._ends[node.digest].append(node)
        self._asked[node.identity, node.lineage.agent].append(node)
        if node.parent:
            node.parent.children.append(node)
        return node

    def answered(self, call: ModelCall) -> Sequence[Node]:
        """Return the generations that answered an equal request of the same agent."""
        return self._asked.get((call.identity, call.lineage.agent), ())

    @property
    def leaves(self) -> list[Node]:
        """The generations that the agent got, and that nothing which it got continues."""
        return [node for node in self.nodes if node.delivered and not any(child.delivered for child in node.children)]

    def superseded(self, node: Node) -> bool:
        """Return whether the agent went on from another answer to the same request, and never from this one.

        The agent may have sent the request again because the answer got lost after it was sent.
        """
        asked = self._asked[node.identity, node.lineage.agent]
        others = [one for one in asked if one.request != node.request]
        return not node.children and any(one.children for one in others)

    @property
    def undelivered(self) -> int:
        """The number of generations that the agent did not get."""
        return sum(not node.delivered for node in self.nodes)

    def _late_reason(self, node: Node, *, again: bool) -> BranchReason | None:
        siblings = node.parent.children if node.parent else self.nodes
        if not siblings:
            return None
        if again:
            return BranchReason.RESAMPLED
        return BranchReason.FORKED if node.parent else BranchReason.OTHER_CONVERSATION

    def _was_asked(self, call: ModelCall) -> bool:
        """Return whether the same agent asked with the same conversation before, perhaps for another sampling."""
        return (call.prefixes[-1], call.lineage.agent) in self._prompts

    def _reason(self, call: ModelCall, parent: Node, added: Sequence[Message]) -> BranchReason | None:
        if any(message["role"] == "assistant" for message in added):
            return self._why_other_turn(parent, added)
        if not parent.children:
            return None
        if self._was_asked(call):
            return BranchReason.RESAMPLED
        return BranchReason.SUB_AGENT if _is_sub_agent(call, parent) else BranchReason.FORKED

    def _why_other_turn(self, parent: Node | None, added: Sequence[Message]) -> BranchReason:
        """Return the reason for messages with a turn of the model that was not sampled after `parent`."""
        siblings = parent.children if parent else [node for node in self.nodes if node.parent is None]
        place = next((i for i, message in enumerate(added) if message["role"] == "assistant"), None)
        if place is None:
            return BranchReason.FORKED
        before, turn = [fingerprint(m) for m in added[:place]], added[place]
        for node in siblings:
            if [fingerprint(m) for m in node.added] == before and fingerprint(node.turn.message) == fingerprint(turn):
                return BranchReason.REASONING_CHANGED
        return BranchReason.HISTORY_EDITED

    def why_new(self, call: ModelCall) -> BranchReason | None:
        """Return why a request extends none of the generations; None if it is the first."""
        if not self.nodes:
            return None
        if self._was_asked(call):
            return BranchReason.RESAMPLED
        if call.lineage.agent is not None and all(node.lineage.agent != call.lineage.agent for node in self.nodes):
            return BranchReason.SUB_AGENT
        windows = {node.lineage.compaction for node in self.nodes if node.lineage.agent == call.lineage.agent}
        if call.lineage.compaction is not None and windows and call.lineage.compaction not in windows:
            return BranchReason.COMPACTED
        said, tools = list(call.fingerprints), call.prefixes[0]
        roots = [node for node in reversed(self.nodes) if node.parent is None]
        longer = [root for root in roots if said[: len(root.added)] == [fingerprint(one) for one in root.added]]
        if any(tools_digest(root.tools) == tools for root in longer):
            return self._why_other_turn(None, call.messages)
        if longer:
            return BranchReason.TOOLS_CHANGED
        if any(tools_digest(root.tools) == tools for root in roots) and self._has_summary(call.messages):
            return BranchReason.COMPACTED
        for root in roots:
            if _without_system(call.messages)[:1] == _without_system(root.added)[:1]:
                return BranchReason.SYSTEM_CHANGED if said[0] != fingerprint(root.added[0]) else BranchReason.FORKED
        return BranchReason.OTHER_CONVERSATION

    def _has_summary(self, messages: Sequence[Message]) -> bool:
        """Return whether the user's first messages have a line of a last answer: agents without labels compact so."""
        turn = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        said = "\n".join(text_of(message) for message in messages[:turn] if message["role"] == "user")
        answers = (node.turn.content for node in self.nodes if not node.children and not node.turn.calls)
        lines = (max(answer.splitlines(), key=len).strip() for answer in answers if answer.strip())
        return any(len(line) >= SHORTEST_SUMMARY and line in said for line in lines)


@dataclass(frozen=True, slots=True)
class Line:
    """One path through the tree, from a root to a leaf.

    trained: the numbers of its nodes whose output is trained in this line. Each node is trained in one line only.
    superseded: whether the leaf's answer probably never reached the agent (`Tree.superseded`).
    """

    nodes: tuple[Node, ...]
    trained: frozenset[int]
    superseded: bool

    @property
    def reasons(self) -> Mapping[int, BranchReason]:
        """Why generations of the line branch, by their numbers."""
        return {node.number: node.reason for node in self.nodes if node.reason is not None}


def lines(tree: Tree) -> Iterator[Line]:
    """Yield the paths of the tree, in the order in which their leaves ended, but superseded ones last.

    So no generation is trained in a superseded path that is also in another one.
    """
    seen: set[int] = set()
    for superseded, leaf in sorted(((tree.superseded(leaf), leaf) for leaf in tree.leaves), key=lambda one: one[0]):
        path = tuple(leaf.path)
        trained = frozenset(node.number for node in path) - seen
        seen |= trained
        yield Line(path, trained, superseded)


def _same_reasoning(node: Node, messages: Sequence[Message]) -> bool:
    """Return whether the reasoning in the turns of a conversation, where it is present, is that of the path."""
    turns = [turn for one in node.path for turn in (*one.added, one.turn.message) if turn["role"] == "assistant"]
    given = [message for message in messages if message["role"] == "assistant"]
    return all(
        (thought := reasoning_of(message)) is None or thought == reasoning_of(turn)
        for message, turn in zip(given, turns, strict=True)
    )


def _is_sub_agent(call: ModelCall, parent: Node) -> bool:
    return call.lineage.agent is not None and call.lineage.agent != parent.lineage.agent


def _without_system(messages: Sequence[Message]) -> list[bytes]:
    return [fingerprint(message) for message in messages if message["role"] != "system"]
