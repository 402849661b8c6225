"""The file of compiled kernels' figures: what changed is compiled, one that did not is compiled too, and must give what the file says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
from pathlib import Path
import triton
import triton.language as tl
from triton.compiler import ASTSource
from tests.kernels import registers

registers.FILE = Path(sys.argv[1])
compiled = []


@triton.jit
def twice(X, Y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(Y + i, FACTOR * tl.load(X + i))


def use(*sizes, again):
    file, compiled[:] = registers.Registers("part"), []
    file.again = again
    for name, B in zip("ab", sizes):
        source = ASTSource(twice, {"X": "*fp32", "Y": "*fp32", "B": "constexpr"}, {"B": B})
        file.figures(name, source, {"num_warps": 1}, lambda kernel: compiled.append(name) or {"loads": kernel.asm["ptx"].count("ld.global")})
    file.close()
    return "".join(compiled)
"""
USES = """
print(use(32, 64, again=None), use(32, 64, again=None) or "none", use(32, 64, again="b"), use(128, 64, again=None))
registers.FILE.write_text(registers.FILE.read_text().replace('"loads": ', '"loads": 1'))
try:
    use(128, 64, again="a")
except AssertionError as error:
    print("refused", error)
"""


def test_only_what_changed_and_the_chosen_one_are_compiled(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("FACTOR", "2") + USES)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path / "registers.json"), "--keep"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.strip().splitlines()
    assert first == "ab none b a"
    assert second.startswith("refused") and "registers.json says {'loads': 1" in second
    script.write_text(PROGRAM.replace("FACTOR", "3") + "print(use(128, 64, again=None))")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ab", "another body is another kernel" + done.stderr[-2000:]
