"""Sizes of the tiles that symmetric products are cut into: what the kernel is built for, and by which it is chosen."""

TILE, DEPTH = 128, 64  # rows of a tile of the result, columns taken at a time: sizes that are no multiples of them go to torch
