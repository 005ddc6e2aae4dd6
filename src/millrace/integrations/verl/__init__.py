"""`actor_rollout_ref.rollout.name=millrace` in verl: rollouts on a Millrace fleet (docs/verl.md).

verl loads `plugin.py` by its entry point group `verl.plugins`. The actor's rank 0 owns the fleet and publishes to it
(`owned.py`), and verl's servers follow it (`server.py`).
"""
