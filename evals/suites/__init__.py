"""The suites of evals/run.py: lists of items, run one by one."""
