"""The settings of a run: their schema and ranges, the checks, and the command line that fills them in."""
