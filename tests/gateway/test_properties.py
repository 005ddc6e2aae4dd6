"""Whatever agents do, each sampled token that they got is trained once, in the context in which it was sampled."""

import asyncio
from random import Random
from typing import Literal

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from millrace.config.gateway import GatewayConfig
from tests.gateway.formats import format_of
from tests.gateway.simulation import Simulation, check

SHAPES = {"qwen3": "object", "qwen2_5": "object", "glm4moe": "glm", "qwen3_6": "markup", "qwen3_8": "markup"}
WITHOUT_SHRINKING = settings(phases=[Phase.explicit, Phase.reuse, Phase.generate])
Drift = Literal["append", "template", "strict"]


def played(name: str, random: Random, steps: int, drift: Drift = "append") -> Simulation:
    simulation = Simulation.start(format_of(name), random, SHAPES[name], GatewayConfig(drift=drift))
    asyncio.run(simulation.play(steps))
    return simulation


@pytest.mark.parametrize("name", SHAPES)
@settings(WITHOUT_SHRINKING, max_examples=40)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 12))
def test_what_agents_got_is_trained_once_as_it_was_sampled(name: str, seed: int, steps: int) -> None:
    check(played(name, Random(seed), steps))


@pytest.mark.parametrize("name", SHAPES)
@settings(WITHOUT_SHRINKING, max_examples=20)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 12))
def test_with_the_templates_own_tokens_too(name: str, seed: int, steps: int) -> None:
    simulation = played(name, Random(seed), steps, "template")
    check(simulation)
    turns = format_of(name)
    for node in simulation.episode.tree.nodes:
        messages = [message for one in node.path[:-1] for message in (*one.added, one.turn.message)]
        prompt = (*(node.parent.token_ids if node.parent else ()), *node.context_ids)
        if not any(message.get("reasoning") for message in messages):  # agents may have dropped it
            assert prompt == turns.prompt([*messages, *node.added], node.tools)


@pytest.mark.parametrize("name", SHAPES)
@settings(WITHOUT_SHRINKING, max_examples=20)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 12))
@example(31, 7)  # an agent that lost an answer asks again for fewer tokens
def test_strictly_no_conversation_drifts(name: str, seed: int, steps: int) -> None:
    simulation = played(name, Random(seed), steps, "strict")
    check(simulation)
    reasons = {node.reason for node in simulation.episode.tree.nodes}
    assert reasons <= {None, "resampled", "sub_agent", "other_conversation"}
    if all(agent.honest for agent in simulation.agents) and len(format_of(name).stop_token_ids) == 1:
        assert simulation.refused == 0


@pytest.mark.parametrize("seed", range(200))
def test_some_hundred_conversations(seed: int) -> None:
    names = list(SHAPES)
    check(played(names[seed % len(names)], Random(seed), 10))


@pytest.mark.slow
def test_ten_thousand_conversations() -> None:
    names, sampled = list(SHAPES), 0
    for seed in range(10_000):
        simulation = played(names[seed % len(names)], Random(f"long {seed}"), 10)
        check(simulation)
        sampled += sum(len(one.output_ids) for one in simulation.fleet.asked)
    print(f"{sampled} sampled tokens in 10,000 conversations, none tokenized again")
