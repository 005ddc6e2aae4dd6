#!/usr/bin/env bash
# verl's separate asynchronous trainer with rollout.name=millrace: the actor on one GPU and an engine on another.
#   MODEL=Qwen/Qwen3-0.6B DATA=train.parquet benchmarks/gpu/verl_separate.sh [verl's settings]
# To check: weights go by nccl, each step publishes one version, and trajectory_staleness stays at one or two steps.
source "$(dirname "$0")/verl_common.sh"
exec python -m verl.trainer.main_ppo "${common[@]}" trainer.n_gpus_per_node=1 \
  trainer.v1.trainer_mode=separate_async trainer.v1.separate_async.parameter_sync_step=1 \
  $R.hybrid_engine=False $R.rollout.nnodes=1 $R.rollout.n_gpus_per_node=1 \
  $R.rollout.checkpoint_engine.backend=millrace +$R.rollout.custom.publish.transport=nccl \
  data.train_batch_size=32 $R.actor.ppo_mini_batch_size=32 "$@"
