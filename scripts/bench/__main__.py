"""Lists the benches, or runs one: `python -m scripts.bench [NAME [ARGUMENTS]]`."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHES = (
    "parallel_rnn",
    "mixer",
    "ssd",
    "delta_rule",
    "dense_rnn",
    "dense_sets",
    "dense_peers",
    "large_rnn",
    "automata",
    "m2rnn",
    "step",
    "decode",
    "memory",
    "long_context",
    "multi_gpu",
    "zero",
)  # the order of all_gpu.sh
HELP = "python -m scripts.bench NAME --help says more of one; scripts/bench/all_gpu.sh runs all."


def described(name: str) -> str:
    """The first sentence of a bench's module."""
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print("\n".join([*(f"{name:<14}{described(name)}." for name in BENCHES), HELP]))
        return 0
    if words[0] not in BENCHES:
        print(f"error: There is no bench {words[0]!r}; choose one of {', '.join(BENCHES)}.", file=sys.stderr)
        return 2
    sys.argv = [f"scripts/bench/{words[0]}.py", *words[1:]]
    runpy.run_module(f"scripts.bench.{words[0]}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
