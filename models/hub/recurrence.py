"""Writes what the exported code has for a nonlinear cell beside its step: derivatives in plain torch, and a Triton kernel of the recurrence.

The kernel walks a row's time in order, a program to some channels: short enough to be read in a modeling file, and for prompts and decoding
a few hundred times faster than a loop in torch. (Training at scale, and the solve of all steps at once on a GPU, stay this project's.)
"""

from __future__ import annotations

from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.expressions import derivatives, function
from kernels.parallel_rnn.functions import functions
from kernels.parallel_rnn.trace import trace

HEADER = """try:  # on a GPU the recurrences run in kernels, if there is Triton
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
jit = (lambda function: function) if triton is None else triton.jit"""


def kernel(cell: Cell) -> str:
    """`kernel_NAME`: all states of a row, in order of time."""
    name, S = cell.name, len(cell.state)
    traced = trace(cell)
    step = function(f"kernel_step_{name}", traced.arguments, traced.new, "h0", legend=traced.legend)
    step_arguments = [*(f"x{p}" for p in range(len(cell.pre))), *(f"w{r}" for r in range(len(cell.rec))), *(f"h{s}" for s in range(S))]
    states = ", ".join(f"h{s}" for s in range(S))
    lines = [
        "@jit",
        f"def kernel_{name}(PRE, REC, H0, STARTS, STATES, FINAL, T, D, sb, st, sp, HAS_STARTS: tl.constexpr, BLOCK: tl.constexpr):",
        "    d, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)",
        "    inside = d < D",
        *(f"    w{r} = tl.load(REC + {r} * D + d, mask=inside, other=0.0)" for r in range(len(cell.rec))),
        *(f"    h{s} = tl.load(H0 + (b * {S} + {s}) * D + d, mask=inside, other=0.0)" for s in range(S)),
        "    at = PRE + b * sb + d",
        "    for t in tl.range(0, T, num_stages=6):  # the inputs of later steps are on their way meanwhile",
        *(f"        x{p} = tl.load(at + {p} * sp, mask=inside, other=0.0).to(tl.float32)" for p in range(len(cell.pre))),
        "        if HAS_STARTS:",
        "            start = tl.load(STARTS + b * T + t)",
        *(f"            h{s} = tl.where(start != 0, 0.0, h{s})" for s in range(S)),
        "        at += st",
        f"        {states} = kernel_step_{name}({', '.join(step_arguments)})",
        *(f"        tl.store(STATES + ((b * T + t) * {S} + {s}) * D + d, h{s}.to(STATES.dtype.element_ty), mask=inside)" for s in range(S)),
        *(f"    tl.store(FINAL + (b * {S} + {s}) * D + d, h{s}, mask=inside)" for s in range(S)),
    ]
    return step.replace("@triton.jit", "@jit").rstrip() + "\n\n\n" + "\n".join(lines)


def written(cells: list[Cell]) -> tuple[list[str], list[str], dict[str, str]]:
    """(derivatives, kernels, each cell's entry in the table CELLS) of the exported file."""
    plain, kernels, entries = list[str](), list[str](), dict[str, str]()
    for cell in cells:
        name = cell.name
        if not cell.lowered or cell.mat:  # plain torch, its derivatives by autograd
            entries[name] = f"(step_{name}, None, None, False)"
            continue
        plain.append("\n\n".join(derivatives(trace(cell), f"jacobian_{name}", f"gradients_{name}")).rstrip())
        kernels.append(kernel(cell))
        entries[name] = f"(step_{name}, (jacobian_{name}, gradients_{name}), kernel_{name}, {trace(cell).jumps})"
    helpers = functions("".join(kernels), short="").replace("@triton.jit", "@jit")
    return plain, [helpers, *kernels] if helpers else kernels, entries
