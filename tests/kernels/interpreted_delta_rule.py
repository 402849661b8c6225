"""Runs the delta rule's Triton kernels in its interpreter and compares them with the float64 loop. Its own process: the interpreter is chosen
when Triton is imported. `python -m tests.kernels.interpreted_delta_rule`"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import triton  # noqa: E402

from kernels.delta_rule import border, delta_rule, launch, op  # noqa: E402
from kernels.delta_rule.reference import delta_rule_sequential  # noqa: E402
from tests.kernels.delta_rule_cases import NAMES, answers, asked, distance, oracle, problem  # noqa: E402
from tests.kernels.interpreter import KNOWN, patch_once, sixteen_bits  # noqa: E402

CASES: list[tuple[tuple[int, ...], dict[str, Any], bool]] = [
    ((2, 70, 4, 24, 2, 40), {"starts": 0.05}, True),  # heads that share keys, widths that are filled up
    ((1, 1, 1, 16, 1, 16), {}, True),
    ((1, 7, 1, 8, 1, 5), {"starts": 0.3}, True),
    ((1, 130, 1, 16, 1, 16), {"decay": 50.0}, True),
    ((1, 70, 1, 16, 1, 16), {"decay": 0.0}, True),
    ((1, 50, 2, 16, 1, 24, 3), {"starts": 0.1}, True),  # three updates a token, which lie across chunks
    ((1, 70, 1, 40, 1, 16), {"unit": True}, False),
    ((1, 66, 1, 16, 1, 16, 2), {"dtype": torch.bfloat16, "starts": 0.05}, True),
    ((1, 66, 1, 16, 1, 16), {"dtype": torch.float16}, True),
]


def compare(label: object, tensors: list[torch.Tensor], starts: torch.Tensor | None, limits: tuple[float, float], **options: Any) -> None:
    do, d_final = asked(tensors)
    wanted, made = oracle(tensors, starts, do, d_final, **options), answers(delta_rule, tensors, starts, do, d_final, **options)
    for i, (name, a, b) in enumerate(zip(("o", "final", *(f"d{n}" for n in NAMES)), made, wanted)):
        error = distance(a, b) if b.norm() > 1e-6 else float((a - b).norm())
        print(label, name, f"{error:.1e}")
        assert a.shape == b.shape and error < limits[i > 1], f"{label}: {name} is off by {error:.1e}"
    again = answers(delta_rule, tensors, starts, do, d_final, **options)
    assert all(torch.equal(a, b) for a, b in zip(made, again))


def extremes() -> None:
    """Keys that repeat with b = 2, gates of one and of nothing, gates of very different sizes; a start at the first, at the last step and at the
    border of chunks."""
    tensors, _ = problem(1, 66, 2, 16, 1, 16)
    starts = torch.zeros(1, 66, dtype=torch.bool)
    starts[0, [0, 63, 64, 65]] = True
    compare("borders", tensors, starts, (1e-5, 1e-4), normalize=True)
    tensors[1][:] = tensors[1][:, :1]
    tensors[3][:] = 2.0
    tensors[4][:, ::5] = -torch.inf
    tensors[4][:, 1::5] = 0.0
    tensors[4][:, 2::5] = -60.0
    compare("repeated keys", tensors, None, (1e-5, 1e-4), normalize=True, scale=0.25)


def not_finite() -> None:
    """A document leaves the results of the others as they are, in whichever input it is not finite, in a chunk of several and across chunks."""
    for bad, place, cuts in ((0, 20, (18, 22)), (1, 9, (5, 75)), (2, 63, (63, 64)), (3, 20, (18, 22)), (4, 30, (18, 40))):
        tensors, _ = problem(2, 80, 1, 5, 1, 6)
        starts = torch.zeros(2, 80, dtype=torch.bool)
        starts[:, list(cuts)] = True
        others = torch.ones(80, dtype=torch.bool)
        others[slice(*cuts)] = False
        with torch.no_grad():
            wanted = delta_rule(*(*tensors, starts), normalize=True)
            tensors[bad][0, place] = torch.nan if bad % 2 or bad == 4 else torch.inf
            o, final = delta_rule(*(*tensors, starts), normalize=True)
        torch.testing.assert_close(o[:, others], wanted[0][:, others])
        torch.testing.assert_close(final, wanted[1])
        assert torch.equal(o[1], wanted[0][1]) and not o[0].isfinite().all()


def without_options(K: int = 16) -> None:
    """No gates, no h0: as zeros; states only, and the gradient of h0 only, as of the whole."""
    tensors, starts = problem(1, 40, 2, 8, 1, K, 2, starts=0.03)
    q, k, v, beta, g, h0 = tensors
    o, final = delta_rule(q, k, v, beta, normalize=True)
    same, end = delta_rule(q, k, v, beta, torch.zeros_like(g), torch.zeros_like(h0), torch.zeros(1, 40, dtype=torch.bool), normalize=True)
    assert torch.equal(o, same) and torch.equal(final, end)
    for new in (starts, None):
        end, through = border.end_state(k, v, beta, g, new, True, 2)
        wanted = delta_rule_sequential(*(*(t.double() for t in tensors), new), normalize=True)[1]
        assert distance(border.reached(through, h0) + end, wanted) < 1e-5
        do, _ = asked(tensors)
        adjoint, _ = border.start_adjoint(do, q, k, beta, g, new, through, normalize=True, scale=0.5)
        wanted = oracle(tensors, new, do, torch.zeros_like(h0), normalize=True, scale=0.5)[-1]
        assert (adjoint - wanted).norm() < 1e-5 * max(1, float(wanted.norm()))


def kept_and_joined() -> None:
    """The same gradients where nothing was kept; those of columns of one tensor are columns of one; and where only one result counts."""
    tensors, starts = problem(1, 70, 2, 16, 2, 16, starts=0.05)
    do, d_final = asked(tensors)
    made = []
    for keep in (True, False):
        leaves = [t.detach().requires_grad_() for t in tensors]
        o, final, *_ = op.rule(*leaves, starts, True, 0.5, keep)
        made.append(torch.autograd.grad((o, final), leaves, (do, d_final), retain_graph=True))
        (alone,) = torch.autograd.grad(final, leaves[2], d_final)
        wanted = oracle(tensors, starts, torch.zeros_like(do), d_final, normalize=True, scale=0.5)[4]
        assert distance(alone, wanted) < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(*made))
    assert len({t.untyped_storage().data_ptr() for t in made[0][:3]}) == 1 and made[0][0].stride(1) == 3 * 32
    for place in range(6):
        leaves = [t.detach().requires_grad_(i == place) for i, t in enumerate(tensors)]
        (one,) = torch.autograd.grad(delta_rule(*(*leaves, starts), normalize=True, scale=0.5), leaves[place], (do, d_final))
        assert torch.equal(one, made[0][place])


def rounded() -> None:
    """In bf16 as a GPU rounds it: what is kept and what is multiplied has 16 bits. Then keys that repeat with b = 2 and no gate, where nothing is
    forgotten: what a state takes up may be rounded once. From here on the interpreter works so."""
    sixteen_bits()
    usual, launch.kind_of = launch.kind_of, lambda dtype: torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    tensors, starts = problem(1, 130, 2, 32, 1, 32, 2, dtype=torch.bfloat16, starts=0.02)
    compare("rounded", tensors, starts, (1e-2, 1e-2), normalize=True, scale=0.25)
    tensors, _ = problem(1, 200, 2, 16, 2, 16, dtype=torch.bfloat16)
    tensors[1] = tensors[1][:, :1].expand_as(tensors[1]).clone()
    tensors[3][:], tensors[4][:] = 2.0, 0.0
    compare("rounded, repeated keys", tensors, None, (5e-2, 8e-2), normalize=True, scale=0.25)
    launch.kind_of = usual


def odd_shapes() -> None:
    """Nothing, a document a token, a state in fp32 beside values in bf16, strides of every kind."""
    for sizes in ((0, 5, 2, 8, 1, 8), (2, 0, 2, 8, 1, 8), (1, 3, 2, 0, 1, 4)):
        tensors, _ = problem(*sizes)
        found = answers(delta_rule, tensors, None, *asked(tensors), normalize=True)
        assert [t.shape for t in found[2:]] == [t.shape for t in tensors]
    tensors, _ = problem(1, 66, 2, 16, 1, 16, dtype=torch.bfloat16)
    compare("a document a token", tensors, torch.ones(1, 66, dtype=torch.bool), (1e-2, 1e-2), normalize=True)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    turned[5] = tensors[5].transpose(2, 3).contiguous().transpose(2, 3)
    for a, b in zip(delta_rule(*(*turned, None), normalize=True), delta_rule(*(*tensors, None), normalize=True)):
        assert torch.equal(a, b)


def two_tiles() -> None:
    """Keys that one tile does not hold."""
    usual, launch.WIDEST_OF_FOUR_BYTES = launch.WIDEST_OF_FOUR_BYTES, 16
    tensors, starts = problem(1, 66, 1, 8, 1, 24, 2, starts=0.05)
    compare("two tiles", tensors, starts, (1e-5, 1e-4), normalize=True, scale=0.25)
    without_options(32)
    launch.WIDEST_OF_FOUR_BYTES = usual


def registered() -> None:
    tensors, starts = problem(1, 9, 2, 16, 1, 16, starts=0.2)
    q, k, v, beta, g, h0 = (t.requires_grad_() for t in tensors)
    for gate, begin, new, keep in ((g, h0, starts, True), (None, None, None, False)):
        torch.library.opcheck(op.rule_op, (q, k, v, beta, gate, begin, new, True, 0.5, keep))
    do, d_final = asked(tensors)
    wanted = answers(delta_rule, tensors, starts, do, d_final, normalize=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(delta_rule, tensors, starts, do, d_final, normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    with torch.no_grad():
        backward_op = torch.ops.everywhen.delta_rule_backward.default
        kept = op.rule(q, k, v, beta, g, h0, starts, True, 0.5, True)[2:]
        arguments = (do, d_final, *[None] * 6, q, k, v, beta, g, h0, starts, *kept, True, 0.5)
        torch.library.opcheck(backward_op, arguments, test_utils=("test_schema", "test_faketensor"))


if __name__ == "__main__":
    patch_once()
    torch.manual_seed(0)
    for sizes, options, normalize in CASES:
        low = options.get("dtype", torch.float32) != torch.float32
        tensors, starts = problem(*sizes, **options)
        compare((sizes, options), tensors, starts, (1e-2, 1e-2) if low else (1e-5, 1e-4), normalize=normalize, scale=sizes[5] ** -0.5)
    extremes()
    not_finite()
    without_options()
    kept_and_joined()
    odd_shapes()
    two_tiles()
    registered()
    if triton.__version__.startswith(KNOWN):
        rounded()
    print("ok")
