"""Evaluation of language models: perplexity by position, with carried state, beside count-based baselines."""

from kernels import interrupts

if interrupts.is_program():
    interrupts.quiet()
