"""How verl finds the plugin, and what it says if it can't be used."""

import subprocess
import sys

import pytest
import verl
from verl.checkpoint_engine.base import CheckpointEngineRegistry
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import RolloutReplicaRegistry

from millrace.integrations.verl.checkpoint_engine import MillraceCheckpointEngine
from millrace.integrations.verl.replica import MillraceReplica
from millrace.integrations.verl.rollout import MillraceRollout


def test_importing_verl_registers_the_rollout() -> None:
    assert RolloutReplicaRegistry.get("millrace") is MillraceReplica
    assert get_rollout_class("millrace") is MillraceRollout
    assert CheckpointEngineRegistry.get("millrace") is MillraceCheckpointEngine


def test_a_verl_that_was_not_tested_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl, "__version__", "0.10.0")
    with pytest.raises(ImportError, match=r"tested with verl 0\.9\.1, and verl 0\.10\.0 is installed"):
        RolloutReplicaRegistry.get("millrace")


def test_what_fails_is_logged_though_verl_hides_it() -> None:
    broken = "millrace.integrations.verl.checkpoint_engine"
    code = f"import sys; sys.modules['{broken}'] = None; import verl; print('goes on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.endswith("goes on\n")
    assert f"rollout.name=millrace is not available: import of {broken}" in done.stderr


def test_reward_models_are_refused() -> None:
    config = {"_target_": "verl.workers.config.RolloutConfig", "name": "millrace", "tensor_model_parallel_size": 1}
    with pytest.raises(NotImplementedError, match="serves the policy only"):
        MillraceReplica(0, config, {}, is_reward_model=True)
