# Sourced by verl_hybrid.sh and verl_separate.sh: a GRPO run of a small model on GSM8K-like data in verl's form.
# MODEL: the model's folder or name. DATA: a parquet file in verl's form (verl's examples/data_preprocess makes one).
# KIND: sglang (the default) or vllm.
set -euo pipefail
: "${MODEL:?set MODEL to the folder or name of a model}" "${DATA:?set DATA to a parquet file in the form of verl}"
R=actor_rollout_ref
common=(
  trainer.nnodes=1 trainer.total_training_steps="${STEPS:-20}" 'trainer.logger=[console]'
  trainer.val_before_train=False trainer.test_freq=-1 trainer.save_freq=-1 trainer.resume_mode=disable
  algorithm.adv_estimator=grpo data.train_files="$DATA" data.val_files="$DATA"
  data.max_prompt_length=512 data.max_response_length=1024
  $R.model.path="$MODEL" $R.model.use_remove_padding=False
  +$R.model.override_config.attn_implementation=sdpa $R.actor.strategy=fsdp2 $R.actor.optim.lr=1e-6
  $R.actor.ppo_micro_batch_size_per_gpu=4 $R.rollout.log_prob_micro_batch_size_per_gpu=8
  $R.rollout.name=millrace $R.rollout.tensor_model_parallel_size=1 $R.rollout.n=8
  $R.rollout.calculate_log_probs=True $R.rollout.gpu_memory_utilization=0.5
  +$R.rollout.custom.engine.kind="${KIND:-sglang}"
)
# verl 0.9.1 itself fails below WARN in separate_async. Millrace's INFO says which version has which step's weights.
export VERL_LOGGING_LEVEL=WARN MILLRACE_LOGGING_LEVEL=INFO RAY_USAGE_STATS_ENABLED=0
