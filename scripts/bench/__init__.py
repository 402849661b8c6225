"""Benches: accuracy first, then speed, against limits and peers of the same run."""
