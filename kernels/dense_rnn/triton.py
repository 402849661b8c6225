"""The Triton kernel of the gradient of dense heads' matrices; imported when it is first wanted. The kernels of a cell are written from its step instead
(source.py).

Of a head it is one long product, of operands and of cotangents over all steps, and each of both is read once: an operand that is the state before
each step lies in the emitted states one row earlier, and of cotangents the columns of a head are read where they lie.

Legend: B batch, T time, N = B T rows, P products side by side, D = E K channels in E heads.
"""

from __future__ import annotations

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def _columns(e, k, se, K: tl.constexpr, HEAD: tl.constexpr):  # offsets of a head's channels in a tensor that lies in blocks of HEAD
    if HEAD % K == 0:
        return (e * K // HEAD).to(tl.int64) * se + (tl.multiple_of(e * K % HEAD, K) + k)
    else:
        d = e * K + k
        return (d // HEAD).to(tl.int64) * se + d % HEAD


@triton.jit(do_not_specialize_on_alignment=["N", "T", "PIECE"])
def gradient_of_matrices(
    OPERAND, H0, RESET, D_PROD, PARTIAL, N, T, PIECE, db, dt, dp, de, P: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr,
    BEFORE: tl.constexpr, HAS_RESET: tl.constexpr, DOT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """PARTIAL (pieces, E K P K + E P K): over PIECE rows the product of a head's operands and cotangents (E, K, P, K), behind it the sums of
    cotangents (E, P, K). BEFORE: the operand of step t is OPERAND (B, T, D) of step t - 1, of the first one H0 (B, D), and nothing where RESET (B, T)
    is set; else it is that of step t."""
    e, piece, E = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    k, c = tl.arange(0, BK), tl.program_id(2) * BN + tl.arange(0, BN)
    product, j = c // BK, c % BK
    across, there = ((product < P) & (j < K))[None, :], product.to(tl.int64) * dp + _columns(e, j, de, K, HEAD)
    inside, last = (k < K)[None, :], tl.minimum((piece + 1) * PIECE, N)
    found, sums = tl.zeros((BK, BN), tl.float32), tl.zeros((BR, BN), tl.float32)
    for first in tl.range(piece * PIECE, last, BR, num_stages=STAGES):
        r = first + tl.arange(0, BR)
        here, b, row = r < N, (r // T).to(tl.int64), r.to(tl.int64)
        t = r % T
        if BEFORE:
            of = tl.where((t > 0)[:, None], OPERAND + (row - 1)[:, None] * D, H0 + b[:, None] * D) + (e * K + k)[None, :]
            taken = here & (tl.load(RESET + r, mask=here, other=1) == 0) if HAS_RESET else here
        else:
            of, taken = OPERAND + row[:, None] * D + (e * K + k)[None, :], here
        u = tl.load(of, mask=taken[:, None] & inside, other=0.0).to(DOT)
        d = tl.load(D_PROD + (b * db + t.to(tl.int64) * dt)[:, None] + there[None, :], mask=here[:, None] & across, other=0.0)
        found = tl.dot(tl.trans(u), d.to(DOT), found, input_precision="ieee")
        sums += d.to(tl.float32)
    to = PARTIAL + piece.to(tl.int64) * (E * (K + 1) * P * K) + (product * K + j)[None, :]
    tl.store(to + (e * K + k)[:, None].to(tl.int64) * (P * K), found, mask=(k < K)[:, None] & across)
    tl.store(to + (E * K + e).to(tl.int64) * (P * K), tl.sum(sums, 0)[None, :], mask=across)
