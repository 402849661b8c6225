"""Suites of measurements: what they are about (subject), which there are (items), and how they are run and kept (runner)."""
