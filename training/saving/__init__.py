"""Writing checkpoints while training goes on, and the command that is run for each."""
