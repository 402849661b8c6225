"""One report of everything measured under a folder."""
