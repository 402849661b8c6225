"""Studies of single methods, a file each: what docs/methods says was found, as JSON in docs/results/methods."""
