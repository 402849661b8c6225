"""Language models assembled from configs: sequence mixers, cells, blocks, and generation."""

from kernels import interrupts

if interrupts.is_program():
    interrupts.quiet()
