"""The Triton kernels that cast weights, those that take one input or all of a pass, and their launches; imported when one is first wanted."""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import triton
import triton.language as tl

from kernels.tensor_lists.triton import addresses, chunks

BLOCK, WARPS = 4096, 8  # elements of a program, and its warps
ALL = 16384  # elements of a program that casts a part of one of many weights


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


@triton.jit
def cast_listed(ADDRESSES, SIZES, TENSOR, PLACE, OUT, TENSORS, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Chunk PLACE[b] of weight TENSOR[b]. ADDRESSES: of TENSORS weights, then of their casts, which are of OUT's dtype."""
    b = tl.program_id(0)
    t = tl.load(TENSOR + b)
    of_x, of_y = tl.load(ADDRESSES + t), tl.load(ADDRESSES + TENSORS + t)
    x, y = of_x.to(tl.pointer_type(tl.float32)), of_y.to(tl.pointer_type(OUT.dtype.element_ty))
    first = tl.load(PLACE + b).to(tl.int64) * CHUNK
    left = tl.load(SIZES + t) - first
    if (left >= CHUNK) & ((of_x | of_y) % 16 == 0):  # without a mask, which would keep loads from being wide
        for i in range(0, CHUNK, BLOCK):
            e = first + i + tl.arange(0, BLOCK)
            tl.store(tl.multiple_of(y + e, 16), tl.load(tl.multiple_of(x + e, 16)).to(OUT.dtype.element_ty))
    else:
        for i in range(0, CHUNK, BLOCK):
            c = i + tl.arange(0, BLOCK)
            tl.store(y + first + c, tl.load(x + first + c, mask=c < left).to(OUT.dtype.element_ty), mask=c < left)


def table(pairs):
    """What `cast_all` takes of pairs (weight in fp32, its cast), contiguous, the casts of one dtype."""
    weights, casts = zip(*pairs)
    device = casts[0].device
    where = addresses(tuple(t.data_ptr() for t in (*weights, *casts)), device)
    return where, *chunks(tuple(w.numel() for w in weights), ALL, device), casts[0], len(weights)


def cast_all(where, sizes, tensor, place, out, tensors):
    cast_listed[(len(tensor),)](where, sizes, tensor, place, out, tensors, CHUNK=ALL, BLOCK=BLOCK, num_warps=WARPS)


def cast(weights, pieces):
    """The weights, fp32, into the pieces, contiguous, in their dtype: a launch for up to three of them, where torch's copies are one each."""
    for i in range(0, len(weights), 3):
        given, made = [w.detach().contiguous() for w in weights[i : i + 3]], list(pieces[i : i + 3])
        sizes, absent = [w.numel() for w in given], 3 - len(given)
        nothing = [made[0].view(-1)[:0]] * absent
        cast_weights[(sum(triton.cdiv(n, BLOCK) for n in sizes),)](
            *given, *nothing, *made, *nothing, *sizes, *[0] * absent, BLOCK=BLOCK, num_warps=WARPS
        )
