"""Evaluation of language models far beyond their training length, with carried state: programs (run, state_tracking), the part in training (in_loop),
and on shelves: models behind one interface (adapters), what they read (inputs), what is measured (measures), suites, cures, the report."""

from kernels import interrupts

if interrupts.is_program():
    interrupts.quiet()
