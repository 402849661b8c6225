"""Figures of compiled kernels (registers and the like), kept in registers.json so that only kernels that changed are compiled again.

    python -m tests.kernels.registers        compiles what changed, and writes registers.json

A figure is taken from the file where its key is still the hash of the kernel's source (with all functions it calls), its types and constants, the
options and Triton's release. One of the kernels, another one each time, is compiled all the same and must give what the file says.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("registers.json")
Figures = dict[str, int]


class Registers:
    """Compiles for sm_90, or looks up, the kernels of one `part` of the file. `--keep` or `--golden` among the words of the program writes it."""

    def __init__(self, part: str) -> None:
        self.part, self.used = part, dict[str, dict[str, Any]]()
        self.known: dict[str, dict[str, Any]] = json.loads(FILE.read_text()).get(part, {}) if FILE.exists() else {}
        self.again = random.SystemRandom().choice(sorted(self.known)) if self.known else None

    def figures(self, label: str, source: Any, options: dict[str, int], read: Callable[[Any], Figures]) -> Figures:
        """`read` of the kernel that triton makes of `source` (an ASTSource)."""
        import triton
        from triton.backends.compiler import GPUTarget

        key = hashlib.sha256(f"{triton.__version__} sm_90 {source.hash()} {sorted(options.items())}".encode()).hexdigest()
        entry = self.known.get(label, {})
        same = entry.get("key") == key
        if same and label != self.again:
            figures = entry["figures"]
        else:
            kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert ".target sm_90" in kernel.asm["ptx"]
            figures = read(kernel)
            assert not same or figures == entry["figures"], f"{FILE} says {entry['figures']} of {self.part} {label}, it has {figures}."
        self.used[label] = {"key": key, "figures": figures}
        return figures

    def report(self, figures: dict[str, Any], golden: Path | None, of: str = "kernels", **arguments: Any) -> None:
        """Ends a program: prints the figures as a line of JSON, and writes them over `golden`, a file whose tests they are, with the arguments that
        they were made with."""
        import triton

        print(json.dumps(figures))
        self.close()
        if golden is not None:
            golden.write_text(json.dumps({"triton": triton.__version__, **arguments, of: figures}, indent=1) + "\n")

    def close(self) -> None:
        """Writes what was used, if asked to."""
        if {"--keep", "--golden"} & set(sys.argv):
            parts = json.loads(FILE.read_text()) if FILE.exists() else {}
            FILE.write_text(json.dumps({**parts, self.part: self.used}, indent=1, sort_keys=True) + "\n")


def source_of(fn: Any, constants: dict[str, Any], kind: Callable[[str], str], aligned: Callable[[str], bool]) -> Any:
    """triton's ASTSource of a kernel: `kind` names the type of an argument that is no constant, `aligned` says of which 16 divides the value."""
    from triton.compiler import ASTSource

    signature = {a: "constexpr" if a in constants else kind(a) for a in fn.arg_names}
    marks = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(fn.arg_names) if a not in constants and aligned(a)}
    return ASTSource(fn, signature, {a: constants[a] for a in fn.arg_names if a in constants}, marks)


def main() -> None:
    from models.cells import diagonal

    names = ("", "_ssd", "_delta_rule", "_dense_rnn", "_large_rnn", "_m2rnn")
    golden, ssd, rule, dense, large, matrix = (json.loads(FILE.with_name(f"resources{n}.json").read_text()) for n in names)
    for words in (
        ["compiled.py", str(golden["ahead"]), str(golden["back"]), *golden["cells"]],
        ["compiled.py", "1", "1", *diagonal(), "three"],
        ["compiled_ssd.py", *map(str, ssd["arguments"])],
        ["compiled_delta_rule.py", *map(str, rule["arguments"])],
        ["compiled_dense_rnn.py", *map(str, dense["arguments"])],
        ["compiled_large_rnn.py", *map(str, large["arguments"])],
        ["compiled_m2rnn.py", *map(str, matrix["arguments"])],
        ["compiled_mixer.py"],
        ["compiled_mamba2_step.py"],
        ["compiled_m2rnn_step.py"],
        ["compiled_delta_step.py"],
        ["compiled_lists.py"],
        ["compiled_attention.py"],
    ):
        module = f"tests.kernels.{words[0].removesuffix('.py')}"
        subprocess.run([sys.executable, "-m", module, *words[1:], "--keep"], cwd=FILE.parents[2], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
