"""One interface over every model that can be evaluated, and whether its code may be run."""
