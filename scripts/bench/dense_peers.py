"""FlashRNN's LSTM where it can be imported and builds, in the shapes of scripts.bench.dense_rnn, each backend in a process with a limit of time.

pip install flashrnn; python -m scripts.bench.dense_peers --out docs/results/dense_rnn/flashrnn.json
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from scripts.bench.dense_rnn import SHAPES
from scripts.bench.timing import Results, attempted, milliseconds

LENGTHS = (512, 2048, 8192)  # steps of four rows, as of scripts.bench.dense_sets
BACKENDS = ("triton_fused", "cuda_fused", "cuda")


def timed(backend: str) -> list[dict[str, Any]]:
    """Milliseconds in bf16 of forward, and of forward and backward, on inputs that are projected already."""
    from flashrnn import flashrnn  # type: ignore[import-not-found, unused-ignore]

    if backend == "triton_fused":
        from flashrnn.flashrnn.triton_fused import lstm_bw  # type: ignore[import-not-found, unused-ignore]

        from scripts.bench.peer_tanh import tanh_in_fp32

        lstm_bw.triton_tanh = tanh_in_fp32
    rows: list[dict[str, Any]] = []
    shapes = [SHAPES[0], SHAPES[4], SHAPES[3], SHAPES[1]]
    for shape in shapes + [(4, T, 12, 64) for T in LENGTHS if backend == "triton_fused"]:
        B, T, E, K = shape
        Wx = torch.randn(B, T, 4, E, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        R = (torch.randn(4, E, K, K, device="cuda") * K**-0.5).bfloat16().requires_grad_()
        b = torch.zeros(4, E, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        forward = functools.partial(flashrnn, Wx, R, b, function="lstm", backend=backend, dtype="bfloat16")

        def both(forward: Any = forward) -> None:
            h, _ = forward()
            h[0].sum().backward()

        with torch.no_grad():
            once = milliseconds(forward, 3)
        rows.append({"backend": backend, "shape": shape, "forward_ms": once})
        print(json.dumps(rows), flush=True)
        rows[-1] |= attempted(lambda both=both: {"forward_backward_ms": milliseconds(both, 3)})  # type: ignore[misc]
        print(json.dumps(rows), flush=True)
    return rows


def apart(backend: str, seconds: float) -> list[dict[str, Any]]:
    """`timed` in a process of its own: as many rows as it got to. Raises RuntimeError with the end of what it said, if it has none."""
    command = [sys.executable, "-m", "scripts.bench.dense_peers", "--backend", backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        said, wrong = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        said, wrong = ((v.decode() if isinstance(v, bytes) else v or "") for v in (late.stdout, late.stderr))
    lines = [line for line in said.splitlines() if line.startswith("[{")]  # ninja counts in brackets
    if not lines:
        raise RuntimeError(f"{backend}: {wrong[-700:] or f'nothing within {seconds} s'}")
    rows: list[dict[str, Any]] = json.loads(lines[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=120, help="for each backend")
    parser.add_argument("--backends", nargs="*", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--backend", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU, and there is none here.")
    if arguments.backend:
        timed(arguments.backend)
        return
    results = Results(arguments.out, torch.device("cuda"))
    for backend in arguments.backends:
        rows = attempted(functools.partial(apart, backend, arguments.seconds))
        for row in rows if isinstance(rows, list) else [{"backend": backend, **rows}]:
            results.append("flashrnn", row)


if __name__ == "__main__":
    main()
