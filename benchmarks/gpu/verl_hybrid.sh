#!/usr/bin/env bash
# verl with rollout.name=millrace on two GPUs, which the actor and the engines use in turn.
#   MODEL=Qwen/Qwen3-0.6B DATA=train.parquet benchmarks/gpu/verl_hybrid.sh [verl's settings]
# To check: weights go by cuda_ipc, every version is published to 2 engines, trajectory_staleness_worst/max is 0,
# rollout_corr/log_ppl_abs_diff is that of bfloat16 (0.0005 was seen) in every step, and nvidia-smi shows the engines' memory released while the actor trains.
source "$(dirname "$0")/verl_common.sh"
export RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1  # the actor's rank 0 copies weights to the GPUs of all engines
exec python -m verl.trainer.main_ppo "${common[@]}" trainer.n_gpus_per_node=2 \
  data.train_batch_size=32 $R.actor.ppo_mini_batch_size=32 "$@"
