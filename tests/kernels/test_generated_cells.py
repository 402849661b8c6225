"""Random cells against the float64 loop (tests/kernels/generate/cells.py), and that it catches faults there have been. A failure prints the line
that runs the case again."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.parallel_rnn import reference
from kernels.parallel_rnn.cell import Cell, Pre, State
from tests.conftest import run_program
from tests.kernels.generate.case import line
from tests.kernels.generate.cells import run_case

ROOT = Path(__file__).parents[2]
MODULE = "tests.kernels.generate.cells"


def failures(seeds: range, dtype: str) -> list[str]:
    results = [run_case(dtype, seed, "cpu") for seed in seeds]
    return [f"{line(MODULE, r.kind, r.seed, r.device)}\n{r.error}" for r in results if not r.ok]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_torch(dtype: str) -> None:
    assert not failures(range(48), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("first", [100, 108])
def test_kernels_in_the_interpreter(first: int) -> None:
    pytest.importorskip("triton")
    words = ["-m", MODULE, "float32", "--cases", "8", "--seed", str(first), "--device", "interpreter"]
    done = run_program(words, timeout=550, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu(tmp_path: Path) -> None:
    """New cells each time, as many as half an hour allows; their lines run them again."""
    out, processes = tmp_path / "cells.json", str(max(1, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", MODULE, "--cases", "100", "--seed", str(secrets.randbelow(10**8)), "--device", "cuda"]
    subprocess.run([*command, "--jobs", processes, "--seconds", "1500", "--out", str(out)], cwd=ROOT, check=False, timeout=2400)
    results = json.loads(out.read_text())["results"]
    assert results and not [f"{line(MODULE, r['kind'], r['seed'], 'cuda')}: {r['error']}" for r in results if not r["ok"]]


def absolute(change: Tensor, size: Tensor) -> float:
    """The certificate as it was: blind to states that are small beside 1."""
    return float((change.abs() / 1.5).nan_to_num(nan=torch.inf).max()) if change.numel() else 0.0


def overflowing(change: Tensor, size: Tensor) -> float:
    """A gap divided by a product that overflowed is zero, and so accepted."""
    return float((change.abs() / size).nan_to_num(nan=0.0).max()) if change.numel() else 0.0


def multiplied(tensor: Tensor, where: Tensor) -> Tensor:
    return tensor * (~where).to(tensor.dtype)


@pytest.mark.parametrize(("name", "fault"), [("share", absolute), ("share", overflowing), ("zeroed", multiplied)])
def test_faults_put_back_are_caught(monkeypatch: pytest.MonkeyPatch, name: str, fault: Any) -> None:
    monkeypatch.setattr(reference, name, fault)
    assert failures(range(48), "float32")


def scaled(a: Pre, x: Pre, h: State) -> tuple[Tensor, ...]:
    return (a * h + x,)


def latch(a: Pre, x: Pre, h: State) -> tuple[Tensor, ...]:
    return (torch.tanh(a * h + x),)


def normalised(z: Pre, i: Pre, f: Pre, c: State, n: State, h: State) -> tuple[Tensor, ...]:
    f, i = torch.sigmoid(f), torch.exp(i)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return c, n, c / n


def signs(x: Pre, h: State) -> tuple[Tensor, ...]:
    return (torch.where(h > 0, 0.99 * h, 0.5 * h) + x,)


def valleys(T: int, D: int) -> Tensor:
    """Gates that let a state fall to 2^-40 and come back, once a hundred steps, at other times in every channel."""
    t = (torch.arange(T)[:, None] + 7 * torch.arange(D)[None]) % 100
    return torch.where(t < 40, 0.5, torch.where(t < 80, 2.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind", ["falls and grows", "falls and latches", "falls and grows with inputs", "gates of e^-16.5", "inputs of 1e-8", "jumps"]
)
def test_small_states_count(kind: str, dtype: torch.dtype) -> None:
    """Cases that a certificate relative to 1 + |state| took for solved: each slice starts from nothing, and so do they."""
    g = torch.Generator().manual_seed(0)
    T, D = 400, 6
    noise, cell = torch.randn(1, T, D, generator=g), Cell.from_step(latch if "latches" in kind else scaled)
    pre = torch.stack([valleys(T, D)[None] * (0.999 if "latches" in kind else 1.0), torch.zeros(1, T, D)], 2)
    if kind == "falls and grows with inputs":
        pre[:, ::97, 1] = noise[:, ::97] * 1e-3
    if kind == "inputs of 1e-8":
        pre = torch.stack([torch.full_like(noise, 0.99), noise * 1e-8], 2)
    if kind == "gates of e^-16.5":
        cell, pre = Cell.from_step(normalised), torch.stack([noise, noise.roll(3, 1) - 16.5, noise.roll(5, 1) + 4], 2)
    if kind == "jumps":
        cell, pre = Cell.from_step(signs), 1e-3 * noise[:, :, None]
    pre = pre.to(dtype)
    S = len(cell.state)
    h0 = torch.full((1, S, D), 0.0 if kind == "inputs of 1e-8" else 1e-7 if S > 1 else 1.0, dtype=torch.float64)
    inner = reference.compute_dtype(pre)
    states = reference.solve(cell, pre.to(inner), torch.zeros(0, D, dtype=inner), h0.to(inner), None, 16)
    exact, _ = reference.sequential(cell, pre.double(), torch.zeros(0, D).double(), h0, None)
    size = exact.abs().unflatten(1, (16, -1)).amax(2).repeat_interleave(T // 16, 1)
    tolerance = {torch.float32: 3e-5, torch.bfloat16: 2e-3, torch.float64: 1e-10}[dtype]
    assert ((states - exact).abs() <= tolerance * size).all(), ((states - exact).abs() / size).max()


def test_products_that_overflow_accept_nothing() -> None:
    """A state of 1e-30 doubles 130 times within a slice: fp32 holds the states, not the product of their Jacobians."""
    pre = torch.ones(1, 300, 2, 3)
    pre[:, 10:140, 0], pre[:, :, 1] = 2.0, 0.0
    h0 = torch.full((1, 1, 3), 1e-30)
    states = reference.solve(Cell.from_step(scaled), pre, torch.zeros(0, 3), h0, None, 2)
    exact, _ = reference.sequential(Cell.from_step(scaled), pre.double(), torch.zeros(0, 3).double(), h0.double(), None)
    assert ((states - exact).abs() <= 1e-6 * exact).all()


def test_adjoints_that_nearly_die_are_passed_on() -> None:
    """What passes a slice is 1e-30, its product none that fp32 holds; below it is small beside an adjoint of that slice, and then grows to its size."""
    pre, d = torch.zeros(1, 64, 2, 3), torch.zeros(1, 64, 1, 3)
    pre[:, :, 0], pre[:, [20, 50], 0], pre[:, 33:37, 0], d[:, 17] = 1.0, 1e30, 1e-15, 1.0
    cell, h0, none = Cell.from_step(scaled), torch.ones(1, 1, 3), torch.zeros(0, 3)
    leaves = [x.double().requires_grad_() for x in (pre, h0)]
    states, final = reference.sequential(cell, leaves[0], none.double(), leaves[1], None)
    wanted = torch.autograd.grad((states * d).sum() + final.sum(), leaves)
    found = reference.linear_backward(cell, pre, none, h0, None, states.detach().float(), d, torch.ones(1, 1, 3), 4)
    assert all(((a - b).abs() <= 1e-6 * b.abs())[b.abs() < 1e37].all() for a, b in zip((found[0], found[2]), wanted))
