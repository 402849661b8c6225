"""Everything at once: packed rows, h0, a gradient of the final state, grouped heads, and the time cut over ranks, against the float64 loop. What
each rank of a launcher runs: `python -m tests.kernels.delta_rule_ranks DEVICE T DTYPES` (T tokens in all; bfloat16,float32); with
TRITON_INTERPRET=1 the kernels run in the interpreter."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.delta_rule import border, delta_rule
from models.slices import Slice
from tests.kernels.delta_rule_cases import NAMES, answers, asked, distance, oracle, problem

OPTIONS: dict[str, Any] = {"normalize": True, "scale": 0.25}


def whole_problem(T: int, dtype: torch.dtype, device: str, sizes: tuple[int, ...]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """(tensors, starts, gradients of the outputs and of the final state). One row starts a document at the border of two halves, the other's
    reaches over it, so that gradients go from the end to the start."""
    B, H, V, G, K, n = sizes
    tensors, starts = problem(B, T, H, V, G, K, n, dtype=dtype, starts=3 / T, decay=2 / T, device=device)
    assert starts is not None
    starts[0, T // 2], starts[1:], starts[-1, T // 4] = True, False, True
    torch.manual_seed(1)
    do, d_final = asked([t.cpu() for t in tensors])
    return tensors, starts, do.to(device), d_final.to(device)


def by_slices(tensors: list[Tensor], starts: Tensor, do: Tensor, d_final: Tensor, count: int) -> list[Tensor]:
    """The answers, slice by slice in one process, with what ranks tell each other."""
    T, n = tensors[0].shape[1], tensors[1].shape[1] // tensors[0].shape[1]
    parts = []
    for r in range(count):
        a, e = r * T // count, (r + 1) * T // count
        cut = [t[:, a * (n if i in (1, 2, 3) else 1) : e * (n if i in (1, 2, 3) else 1)] for i, t in enumerate(tensors[:5])]
        parts.append((cut, starts[:, a:e].contiguous(), do[:, a:e]))
    told = [border.end_state(c[1], c[2], c[3], c[4], new, True, n) for c, new, _ in parts]
    begins = [tensors[5].float()]
    for end, through in told[:-1]:
        begins.append(end + border.reached(through, begins[-1]))
    ends = [d_final]
    for (c, new, given), (_, through) in list(zip(parts, told))[:0:-1]:
        adjoint, _ = border.start_adjoint(given, c[0], c[1], c[3], c[4], new, through, **OPTIONS)
        ends.insert(0, adjoint + border.reached_back(through, ends[0]))
    made = []
    for (c, new, given), begin, later in zip(parts, begins, ends):
        leaves = [t.detach().requires_grad_() for t in (*c, begin)]
        o, final = delta_rule(*(*leaves, new), **OPTIONS)
        made.append([o.detach(), final.detach(), *torch.autograd.grad((o, final), leaves, (given, later))])
    joined = [torch.cat([m[i] for m in made], 1) for i in (0, 2, 3, 4, 5, 6)]
    return [joined[0], made[-1][1], *joined[1:], made[0][7]]


def on_a_rank(tensors: list[Tensor], starts: Tensor, do: Tensor, d_final: Tensor, slice_: Slice) -> tuple[list[Tensor], slice]:
    """This rank's answers, with the exchange that mixers use: what is asked of the last state joins the adjoint of the last slice."""
    T, n, N, r = tensors[0].shape[1], tensors[1].shape[1] // tensors[0].shape[1], slice_.size, slice_.rank
    mine, steps = slice(r * T // N, (r + 1) * T // N), slice(r * T // N * n, (r + 1) * T // N * n)
    cut = [t[:, steps if i in (1, 2, 3) else mine].contiguous() for i, t in enumerate(tensors[:5])]
    new, given = starts[:, mine].contiguous(), do[:, mine].contiguous()
    end, through = border.end_state(cut[1], cut[2], cut[3], cut[4], new, True, n)
    ends, throughs = slice_.gather_two(end, through, "states")
    begin = tensors[5].float()
    for m in range(r):
        begin = ends[m] + border.reached(throughs[m], begin)
    leaves = [t.detach().requires_grad_() for t in (*cut, begin)]

    def local(d_outputs: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor]:
        adjoint, product = border.start_adjoint(d_outputs, *saved, **OPTIONS)
        return adjoint + border.reached_back(product, d_final) * (r == N - 1), product

    o, final = delta_rule(*(*leaves, new), **OPTIONS)
    loss = (final * d_final).sum() * (r == N - 1)
    q, k, _, beta, g, _ = leaves
    out = slice_.with_adjoint_from_right(o, final, local, border.reached_back, q, k, beta, g, new, through)
    gradients = torch.autograd.grad([out, loss], leaves, [given, torch.ones_like(loss)])
    return [o.detach(), final.detach(), *gradients], mine


def compare(found: list[Tensor], wanted: list[Tensor], limit: float, skip: tuple[str, ...] = ()) -> None:
    for name, a, b in zip(("o", "final", *(f"d{n}" for n in NAMES)), found, wanted):
        if name not in skip:
            assert distance(a, b) < limit, f"{name} is off by {distance(a, b):.1e}"


def compiled(tensors: list[Tensor], starts: Tensor, do: Tensor, slice_: Slice) -> None:
    """Ranks of one machine share the kernels that they compile: the even ones begin with those of the rule, the others with those of borders."""
    T, n, N, r = tensors[0].shape[1], tensors[1].shape[1] // tensors[0].shape[1], slice_.size, slice_.rank
    q, k, v, beta, g = (t[:, r * t.shape[1] // N : (r + 1) * t.shape[1] // N].contiguous() for t in tensors[:5])
    new, given = (t[:, r * T // N : (r + 1) * T // N].contiguous() for t in (starts, do))
    if r % 2:
        end, through = border.end_state(k, v, beta, g, new, True, n)
        border.start_adjoint(given, q, k, beta, g, new, through, **OPTIONS)
    else:
        answers(delta_rule, [q, k, v, beta, g, tensors[5]], new, given, tensors[5], **OPTIONS)


def main(device: str, T: int, dtypes: list[torch.dtype]) -> None:
    began = time.monotonic()

    def tell(what: str) -> None:
        if os.environ["RANK"] == "0":
            print(f"{time.monotonic() - began:6.1f} s: {what}", flush=True)

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    slice_, n = Slice(), 2 if device == "cuda" else 1
    sizes = (3, 4, 64, 2, 128, n) if device == "cuda" else (2, 2, 6, 1, 8, n)
    for dtype in dtypes:
        tell(f"{dtype}, {slice_.size} ranks")
        tensors, starts, do, d_final = whole_problem(T, dtype, device, sizes)
        if device == "cuda":
            compiled(tensors, starts, do, slice_)
            dist.barrier()
            tell("kernels are compiled")
        if T > 1024:  # the loop takes seconds; chunks in float64 are compared with it in test_delta_rule.py and test_gpu_delta_rule.py
            wanted = answers(delta_rule, [t.double() for t in tensors], starts, do.double(), d_final.double(), **OPTIONS)
        else:
            wanted = oracle(tensors, starts, do, d_final, **OPTIONS)
        tell("float64 is there")
        found, mine = on_a_rank(tensors, starts, do, d_final, slice_)
        steps = slice(mine.start * n, mine.stop * n)
        cut = [wanted[0][:, mine], wanted[1], *(w[:, steps if i in (1, 2, 3) else mine] for i, w in enumerate(wanted[2:7])), wanted[7]]
        last, first = slice_.rank == slice_.size - 1, slice_.rank == 0
        compare(found, cut, 2e-2 if dtype == torch.bfloat16 else 1e-4, (() if last else ("final",)) + (() if first else ("dh0",)))
        print(f"rank {slice_.rank}: {dtype} is equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), [getattr(torch, name) for name in sys.argv[3].split(",")])
