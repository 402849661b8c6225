"""What scripts/bench/parallel_rnn.py measures beside the solve: whole layers, and others who do the same (the torch loop, the published Newton
iteration, pararnn-torch, cuDNN)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.parallel_rnn import launch, parallel_rnn, reference
from models.cells import load_cell
from scripts.bench.parallel_rnn_solve import inputs
from scripts.bench.timing import milliseconds


def layer_row(name: str, B: int, T: int, D: int) -> dict[str, Any]:
    """Input projection in four heads and the solve, then the whole published mixer; forward and backward with every gradient."""
    from models.mixers.rnn import Config, Mixer

    mixer = Mixer(Config(cell=name), D, 0).cuda()
    mixer.init_weights(0.02, 24)
    mixer = mixer.to(torch.bfloat16)
    cell, P = load_cell(name), len(load_cell(name).pre)
    x = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(4, D // 4, P * D // 4, device="cuda", dtype=torch.bfloat16) * (D / 4) ** -0.5).requires_grad_()
    rec = (torch.randn(len(cell.rec), D, device="cuda") * D**-0.5).requires_grad_()
    bias = torch.zeros(P, D, device="cuda", requires_grad=True)
    dy = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16)

    def layer() -> None:
        pre = torch.einsum("btei,eio->bteo", x.unflatten(-1, (4, -1)), weight).unflatten(-1, (P, -1)).transpose(2, 3)
        torch.autograd.grad(parallel_rnn(cell, pre, rec, bias_PD=bias, emitted=True)[0], (x, weight, rec, bias), dy)

    def block() -> None:
        torch.autograd.grad(mixer(x)[0], (x, *mixer.parameters()), dy)

    return {"cell": name, "B": B, "T": T, "D": D, "layer_fwd_bwd_ms": milliseconds(layer, 10), "mixer_fwd_bwd_ms": milliseconds(block, 10)}


def against_loop(name: str, T: int) -> dict[str, Any]:
    """Forward of the naive torch loop (one run) and of the kernels."""
    cell, pre, rec, h0 = inputs(name, 1, T, 2048, torch.bfloat16)
    with torch.no_grad():
        loop = milliseconds(lambda: reference.sequential(cell, pre, rec, h0, None), 1)
        ours = milliseconds(lambda: launch.forward(cell, pre, rec, h0, None))
    return {"cell": name, "T": T, "loop_ms": loop, "ours_ms": ours, "times": loop / ours}


def peer_row(kind: str, B: int, T: int, D: int) -> dict[str, Any]:
    """pararnn-torch, where it is installed: its whole layer (input projection and solve), forward and backward with every gradient."""
    import pararnn

    net = getattr(pararnn, kind)(D, D, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run() -> Tensor:
        out = pararnn.newton_apply(net, x)
        return out[0] if isinstance(out, tuple) else out

    dy = torch.randn_like(run())  # of an LSTM both states come out, (B, T, 2, D)

    def layer() -> None:
        torch.autograd.grad(run(), (x, *net.parameters()), dy, allow_unused=True)

    return {"peer": f"pararnn-torch {pararnn.__version__} {kind}", "B": B, "T": T, "D": D, "layer_fwd_bwd_ms": milliseconds(layer, 5)}


def cudnn_row(kind: str, B: int, T: int, D: int) -> dict[str, Any]:
    """cuDNN's dense recurrence of equal width: another model (full recurrent matrix), for scale."""
    net = getattr(torch.nn, kind)(D, D, batch_first=True, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        forward = milliseconds(lambda: net(x), 3)
    both = milliseconds(lambda: torch.autograd.grad(net(x)[0], (x, *net.parameters()), dy), 3)
    return {"cudnn": kind, "B": B, "T": T, "D": D, "forward_ms": forward, "fwd_bwd_ms": both}


def elementwise_newton(cell: Any, pre: Tensor, rec: Tensor, iterations: int = 3) -> Tensor:
    """The published algorithm (arXiv 2510.21450) in plain torch, one state: Newton on every h_t at once, each linear system solved by a
    doubling scan over time, a fixed number of iterations from zero."""
    h_BTSD = pre.new_zeros(pre.shape[0], pre.shape[1], 1, pre.shape[-1], dtype=torch.float32)
    x = pre.float()
    for _ in range(iterations):
        before = torch.nn.functional.pad(h_BTSD, (0, 0, 0, 0, 1, 0))[:, :-1]
        a = reference.jacobian(cell, x, rec, before).reshape(before[:, :, 0].shape)
        b = cell(x.unbind(2), rec.unbind(0), before.unbind(2))[0] - a * before[:, :, 0]
        shift = 1
        while shift < b.shape[1]:
            b = torch.cat((b[:, :shift], b[:, shift:] + a[:, shift:] * b[:, :-shift]), 1)
            a = torch.cat((a[:, :shift], a[:, shift:] * a[:, :-shift]), 1)
            shift *= 2
        h_BTSD = b[:, :, None]
    return h_BTSD


def newton_row(B: int, T: int, D: int) -> dict[str, Any]:
    cell, pre, rec, h0 = inputs("paragru", B, T, D, torch.bfloat16)
    with torch.no_grad():
        newton_states = elementwise_newton(cell, pre, rec)
        ours = launch.forward(cell, pre, rec, h0, None)[0]
        error = (newton_states[:, :, 0] - ours.float()).abs().max().item()
        return {
            "B": B,
            "T": T,
            "D": D,
            "newton_3_ms": milliseconds(lambda: elementwise_newton(cell, pre, rec), 5),
            "largest_difference_to_ours": error,
        }
