"""Data: from documents to token shards, and from shards to batches whose order is a pure function of (seed, step)."""

from kernels import interrupts

if interrupts.is_program():
    interrupts.quiet()
