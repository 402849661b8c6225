"""What a run costs before it runs: FLOPs, memory, and whether it fits."""
