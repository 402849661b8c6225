"""Generators of random problems: each is determined by its kind, its seed and the device, and compared with float64."""
