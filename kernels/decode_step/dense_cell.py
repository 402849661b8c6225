"""Writes the kernel that projects the inputs of a cell with dense heads and takes its step; scripts/print_kernels.py prints it.

project_and_step: U (B, blocks I) -> the inputs of the cell by a block-diagonal product with WEIGHT (blocks, I, inputs, O), O channels a block;
products with MAT (E, K, matrices, K); STATE (B, states, D) moved on in place. A program owns a head of one row, whose old state all its products
read; heads lie within blocks.
"""

from __future__ import annotations

from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.expressions import function
from kernels.parallel_rnn.functions import functions
from kernels.parallel_rnn.products import trace_dense


def source(cell: Cell) -> str:
    """The text of the module. Raises NotLowered if the step cannot be traced."""
    dense, inputs, S, G = trace_dense(cell), len(cell.pre), len(cell.state), len(cell.mat)
    given = [f"x{p}" for p in range(inputs)] + [f"w{r}" for r in range(len(cell.rec))] + [f"h{s}" for s in range(S)]
    made = [function(f"operands{l}", dense.arguments, [dense.operands[i] for i in level], "h0") for l, level in enumerate(dense.levels)]
    made.append(function("new", dense.arguments, dense.new, "h0"))
    lines = [
        "@triton.jit",
        "def project_and_step(U, WEIGHT, BIAS, REC, MAT, STATE, D, I, O, su, K: tl.constexpr, PDL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):",
        "    b, e = tl.program_id(0).to(tl.int64), tl.program_id(1)",
        "    k, row, i = tl.arange(0, BN), tl.arange(0, BN), tl.arange(0, BK)",
        "    here, d = k < K, e * K + k",
        "    block, o = e * K // O, e * K % O + k",
        *(f"    w{r} = tl.load(REC + {r} * D + d, mask=here, other=0.0)" for r in range(len(cell.rec))),
        "    if PDL:",
        "        tl.extra.cuda.gdc_launch_dependents()",
        "        tl.extra.cuda.gdc_wait()",
        *(f"    sum{p} = tl.zeros((BK, BN), tl.float32)" for p in range(inputs)),
        "    for first in range(0, I, BK):",
        f"        place = WEIGHT + (block * I + first + i)[:, None].to(tl.int64) * ({inputs} * O) + o[None, :]",
        "        both = (first + i < I)[:, None] & here[None, :]",
        "        u = tl.load(U + b * su + block * I + first + i, mask=first + i < I, other=0.0).to(tl.float32)[:, None]",
        *(f"        sum{p} += tl.load(place + {p} * O, mask=both, other=0.0).to(tl.float32) * u" for p in range(inputs)),
        *(f"    x{p} = tl.sum(sum{p}, 0) + tl.load(BIAS + {p} * D + d, mask=here, other=0.0).to(tl.float32)" for p in range(inputs)),
        *(f"    h{s} = tl.load(STATE + (b * {S} + {s}) * D + d, mask=here, other=0.0)" for s in range(S)),
        f"    matrix = MAT + (e * K + row)[:, None].to(tl.int64) * ({G} * K) + k[None, :]",
        "    both = (row < K)[:, None] & here[None, :]",
    ]
    known: list[int] = []
    for l, level in enumerate(dense.levels):
        arguments = ", ".join(given + [f"p{i}" if i in known else "h0" for i in range(len(dense.products))])
        lines.append(f"    {', '.join(f'u{i}' for i in level)} = operands{l}({arguments})")
        for i in dense.of_level(l):
            product = dense.products[i]
            loaded = f"tl.load(matrix + {product.matrix} * K, mask=both, other=0.0).to(tl.float32)"
            operand = f"tl.where(here, u{product.operand}, 0.0)[:, None]"
            lines.append(f"    p{i} = tl.sum({loaded} * {operand}, 0)")
            known.append(i)
    arguments = ", ".join(given + [f"p{i}" for i in range(len(dense.products))])
    lines += [
        f"    {', '.join(f'y{s}' for s in range(S))} = new({arguments})",
        "    tl.debug_barrier()  # all have read the old state",
        *(f"    tl.store(STATE + (b * {S} + {s}) * D + d, y{s}, mask=here)" for s in range(S)),
    ]
    header = f'"""The decoding step of the cell {cell.name}, written by kernels/decode_step/dense_cell.py."""\nimport triton\nimport triton.language as tl\n'
    parts = "\n\n".join(made)
    return "\n\n".join([header, functions(parts, short="") + "\n", parts, "\n".join(lines) + "\n"])
