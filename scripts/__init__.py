"""Programs over the packages: what people run, benches, checks and studies."""

from kernels import interrupts

if interrupts.is_program():
    interrupts.quiet()
