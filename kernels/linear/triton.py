"""The Triton kernel that casts weights which take one input, and its launch; imported when it is first wanted."""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8  # elements of a program, and its warps


@triton.jit
def _cast(X, OUT, b, N, BLOCK: tl.constexpr):
    i = b.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + i, tl.load(X + i, mask=i < N).to(OUT.dtype.element_ty), mask=i < N)


@triton.jit
def cast_weights(A, B, C, OUT_A, OUT_B, OUT_C, NA, NB, NC, BLOCK: tl.constexpr):
    """NA, NB and NC elements."""
    b, of_a, of_b = tl.program_id(0), tl.cdiv(NA, BLOCK), tl.cdiv(NB, BLOCK)
    if b < of_a:
        _cast(A, OUT_A, b, NA, BLOCK)
    elif b < of_a + of_b:
        _cast(B, OUT_B, b - of_a, NB, BLOCK)
    else:
        _cast(C, OUT_C, b - of_a - of_b, NC, BLOCK)


def cast(weights, pieces):
    """The weights, fp32, into the pieces, contiguous, in their dtype: a launch for up to three of them, where torch's copies are one each."""
    for i in range(0, len(weights), 3):
        given, made = [w.detach().contiguous() for w in weights[i : i + 3]], list(pieces[i : i + 3])
        sizes, absent = [w.numel() for w in given], 3 - len(given)
        nothing = [made[0].view(-1)[:0]] * absent
        cast_weights[(sum(triton.cdiv(n, BLOCK) for n in sizes),)](
            *given, *nothing, *made, *nothing, *sizes, *[0] * absent, BLOCK=BLOCK, num_warps=WARPS
        )
