"""Training: configuration, the DeepSpeed engine, checkpoints, schedules, metrics and fault handling."""

from kernels import interrupts

if interrupts.is_program():
    interrupts.quiet()
