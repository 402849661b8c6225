"""Runs the Triton kernels of M2RNN in its interpreter and compares them with the float64 loop. Its own process: the interpreter is chosen when
Triton is imported. `python -m tests.kernels.interpreted_m2rnn`"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from kernels.m2rnn import launch, m2rnn, op, reference  # noqa: E402
from tests.kernels.interpreter import far_apart, patch_once  # noqa: E402
from tests.kernels.m2rnn_cases import LABELS, answers, asked, distance, oracle, problem  # noqa: E402

reference.EVERY = launch.EVERY = 8  # the interpreter is slow
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 18, 4, 24, 2, 40), {"starts": 0.05}),  # heads that share keys, widths that are filled up
    ((1, 1, 1, 16, 1, 16), {}),
    ((1, 17, 2, 5, 1, 70), {"starts": 0.3}),  # a state of two blocks of rows
    ((1, 9, 1, 16, 1, 16), {"decay": 0.0}),
    ((1, 7, 1, 8, 1, 5), {"decay": 60.0, "gain": 4.0}),
    ((1, 17, 1, 16, 1, 16), {"dtype": torch.bfloat16, "starts": 0.05}),
    ((1, 9, 1, 16, 1, 16), {"dtype": torch.float16}),
]


def compare(
    label: object,
    tensors: list[torch.Tensor],
    starts: torch.Tensor | None,
    limits: tuple[float, float],
    scale: float = 1.0,
    last: bool = False,
) -> None:
    """last: of a loss at the last step alone."""
    do, d_final = asked(tensors)
    do[:, : do.shape[1] - 1 if last else 0] = 0
    wanted, made = oracle(tensors, starts, do, d_final), answers(m2rnn, tensors, starts, do, d_final, scale)
    for i, (name, a, b) in enumerate(zip(LABELS, made, wanted)):
        error = distance(a, b) if b.norm() > 1e-6 else float((a - b).norm())
        print(label, name, f"{error:.1e}")
        assert a.shape == b.shape and error < limits[i > 1], f"{label}: {name} is off by {error:.1e}"
    if label == "borders":
        again = answers(m2rnn, tensors, starts, do, d_final, scale)
        assert all(torch.equal(a, b) for a, b in zip(made, again))


def extremes() -> None:
    """Gates of one and of nothing, starts at the first, at the last step and at the border of chunks; a small loss; the states of few chunks at a
    time."""
    tensors, _ = problem(1, 26, 1, 16, 1, 16)
    starts = torch.zeros(1, 26, dtype=torch.bool)
    starts[0, [0, 15, 16, 25]] = True
    tensors[3][:, ::5] = -torch.inf
    tensors[3][:, 1::5] = 0.0
    compare("borders", tensors, starts, (1e-5, 1e-4))
    many, launch.SCRATCH = launch.SCRATCH, 1
    compare("chunk by chunk, of a small loss", tensors, starts, (1e-5, 1e-4), scale=1e-8)
    compare("of a small loss at the last step", tensors, None, (1e-5, 1e-4), scale=1e-8, last=True)
    launch.SCRATCH = many


def blocks_beyond_others() -> None:
    """A kernel's blocks of rows reach beyond those of another, as tiles of 16 bits' operands do; what memory held before is NaN."""
    tiles, scratch = launch.TILES_WIDE, launch.Problem.scratch

    def filled(self: launch.Problem, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    launch.TILES_WIDE, launch.Problem.scratch = {**tiles, "gradients": (64, 4)}, filled  # type: ignore[method-assign]
    compare("blocks of other sizes", *problem(1, 10, 1, 5, 1, 33), (1e-5, 1e-4))
    launch.TILES_WIDE, launch.Problem.scratch = tiles, scratch  # type: ignore[method-assign]


def not_finite() -> None:
    """A document leaves the results and the gradients of the others as they are, in whichever input it is not finite."""
    for bad, place in ((0, 5), (1, 3), (2, 8), (3, 7)):
        tensors, _ = problem(2, 11, 1, 5, 1, 6)
        starts = torch.zeros(2, 11, dtype=torch.bool)
        starts[:, [3, 9]] = True
        others = torch.ones(11, dtype=torch.bool)
        others[3:9] = False
        do, d_final = asked(tensors)
        wanted = answers(m2rnn, tensors, starts, do, d_final)
        tensors[bad][0, place] = torch.nan
        found = answers(m2rnn, tensors, starts, do, d_final)
        for i in (0, 2, 3, 4, 5):
            assert torch.equal(found[i][:, others], wanted[i][:, others]), (bad, LABELS[i])
        assert torch.equal(found[1], wanted[1]) and torch.equal(found[7], wanted[7])
        assert not found[0][0].isfinite().all() and torch.equal(found[0][1], wanted[0][1])


def long_rows() -> None:
    """Inputs whose steps lie far apart, as columns of a wide projection of many tokens do."""
    tensors, starts = problem(1, 3, 2, 8, 2, 8, dtype=torch.float16, starts=0.3)
    do, d_final = asked(tensors)
    near = answers(m2rnn, tensors, starts, do, d_final)
    far = answers(m2rnn, [*(far_apart(x) for x in tensors[:3]), *tensors[3:]], starts, do, d_final)
    assert all(torch.equal(a, b) for a, b in zip(near, far))


def registered() -> None:
    tensors, starts = problem(1, 9, 2, 16, 1, 16, starts=0.2)
    q, k, v, g, w, h0 = (t.requires_grad_() for t in tensors)
    for begin, new in ((h0, starts), (None, None)):
        torch.library.opcheck(op.walk_op, (q, k, v, g, w, begin, new, True))
    with torch.no_grad():
        o, final, borders = op.walk(*tensors, starts, True)
        arguments = (torch.ones_like(o), torch.ones_like(final), torch.zeros_like(borders), *tensors, starts, borders)
        torch.library.opcheck(torch.ops.everywhen.m2rnn_backward.default, arguments, test_utils=("test_schema", "test_faketensor"))
        assert torch.equal(o, m2rnn(*(*tensors, starts))[0])  # as without states at borders


if __name__ == "__main__":
    patch_once()
    torch.manual_seed(0)
    for sizes, options in CASES:
        low = options.get("dtype", torch.float32) != torch.float32
        tensors, starts = problem(*sizes, **options)
        compare((sizes, options), tensors, starts, (1e-2, 1e-2) if low else (1e-5, 1e-4))
    extremes()
    blocks_beyond_others()
    not_finite()
    long_rows()
    registered()
    print("ok")
