"""Operations with a plain torch reference and, where it pays, Triton kernels."""

from . import interrupts

if interrupts.is_program():
    interrupts.quiet()
