"""Checks that take longer than a test: agreement with transformers, killed ranks, two machines, one command line after another."""
