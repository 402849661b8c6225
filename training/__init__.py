"""Training: configuration, the DeepSpeed engine, checkpoints, schedules, metrics and fault handling."""
