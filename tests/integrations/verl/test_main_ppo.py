"""verl's own trainer, unmodified, with rollout.name=millrace."""

from pathlib import Path

import pytest

from tests.integrations.verl.running import ACTOR, HERE, ROLLOUT, Run, train

pytestmark = pytest.mark.timeout(1800)
CLOSE = 1e-4  # between the logprobs of the engine and of the actor; after one step of training they differ by far more


def require_on_policy(run: Run, steps: int) -> None:
    """The run ended well, and all samples were made by the actor's weights of the same step."""
    assert run.returned == 0, run.log[-5000:]
    assert [metrics["training/global_step"] for metrics in run.steps] == list(range(1, steps + 1))
    for metrics in run.steps:
        assert 0 <= metrics["critic/score/mean"] <= 1
        assert metrics["training/off_policy/trajectory_staleness_worst/max"] == 0
        assert metrics["rollout_corr/log_ppl_abs_diff"] < CLOSE
        assert metrics["actor/grad_norm"] > 0
    assert run.published("hybrid") == [(step + 1, step) for step in range(steps + 1)]


def test_fsdp2_on_one_rank(tiny_model: Path, tmp_path: Path) -> None:
    run = train(tiny_model, tmp_path, f"{ACTOR}.strategy=fsdp2")
    require_on_policy(run, steps=3)
    assert {len(samples) for samples in run.generations.values()} == {16}


@pytest.mark.slow
def test_fsdp2_on_two_ranks_with_tools(tiny_model: Path, tmp_path: Path) -> None:
    """Two ranks, and so two of verl's replicas; and conversations of several turns."""
    run = train(
        tiny_model,
        tmp_path,
        f"{ACTOR}.strategy=fsdp2",
        f"{ROLLOUT}.agent.default_agent_loop=tool_agent",
        f"{ROLLOUT}.multi_turn.enable=True",
        f"{ROLLOUT}.multi_turn.format=always",
        f"{ROLLOUT}.multi_turn.max_assistant_turns=3",
        f"{ROLLOUT}.multi_turn.function_tool_path={HERE / 'calling_tools.py'}",
        "data.max_response_length=120",
        steps=2,
        ranks=2,
    )
    require_on_policy(run, steps=2)
    texts = [str(sample["output"]) for samples in run.generations.values() for sample in samples]
    assert any(text.count("<tool_response>\n5\n</tool_response>") == 2 for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", [True, False], ids=["with hybrid replicas", "standalone replicas only"])
def test_separate_async(hybrid: bool, tiny_model: Path, tmp_path: Path) -> None:
    """The trainer and the standalone engines work at the same time, so samples may be older than the actor."""
    run = train(
        tiny_model,
        tmp_path,
        f"{ACTOR}.strategy=fsdp2",
        "trainer.v1.trainer_mode=separate_async",
        "trainer.v1.separate_async.parameter_sync_step=1",
        f"actor_rollout_ref.hybrid_engine={hybrid}",
        f"{ROLLOUT}.nnodes=1",
        f"{ROLLOUT}.n_gpus_per_node=1",
        f"{ROLLOUT}.checkpoint_engine.backend=millrace",
        steps=3,
        gpus=2,
    )
    assert run.returned == 0, run.log[-5000:]
    assert [metrics["training/global_step"] for metrics in run.steps] == [1, 2, 3]
    assert run.published("standalone") == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert run.published("hybrid") == ([(1, 0)] if hybrid else [])  # used until the actor trains
