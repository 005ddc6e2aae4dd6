"""Experiment trackers: TensorBoard, Weights & Biases, MLflow and Trackio (docs/monitoring.md).

`recorder.py` is the trainer's side. Each tracker is a process of its own (`process.py`) with one adapter: a package
that hangs, or that waits for its network, delays no step.
"""
