"""The kernels of optimizers without a GPU: in the interpreter and compiled, and what runs in their place; on a GPU against float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.symmetric import symmetric, use_triton
from kernels.tensor_lists import momentum_and_update, muon_kernels_take, reference, take_step, total_norm
from kernels.tensor_lists import use_triton as takes
from tests.conftest import on_gpu
from tests.kernels import left_out_cases
from tests.kernels.test_triton import run
from training.optim import SkippableAdamW
from training.optim.newton_schulz import orthogonalized

HERE = Path(__file__).parent


def test_every_kernel_in_the_interpreter() -> None:
    assert run("interpreted_lists.py") == "ok"


@pytest.mark.slow
def test_registers_are_those_of_the_golden_file_and_none_spill() -> None:
    """Another release of Triton may count otherwise: then only spilling is a failure, and loads that are not wide."""
    import triton

    golden, compiled = json.loads((HERE / "resources_lists.json").read_text()), json.loads(run("compiled_lists.py"))
    assert compiled and all(use.get("spilled", 0) == 0 and use["wide"] for use in compiled.values()), compiled
    if triton.__version__ == golden["triton"]:
        assert compiled == golden["kernels"], "If the change is wanted: python -m tests.kernels.compiled_lists --golden"


def test_without_kernels_the_norm_is_torchs_and_symmetric_products_are_products() -> None:
    tensors = [torch.randn(5, 3), torch.randn(7)]
    assert torch.equal(total_norm(tensors), torch.nn.utils.get_total_norm(tensors))
    x, add = torch.randn(3, 4, 9), torch.randn(3, 4, 4)
    torch.testing.assert_close(symmetric(x, alpha=2.0), 2 * x @ x.mT)
    torch.testing.assert_close(symmetric(x.mT, None, symmetric(x.mT), 0.5, -1.0), -0.5 * x.mT @ x)
    torch.testing.assert_close(symmetric(x, x, add, 0.5, -1.0), 0.5 * x @ x.mT - add)
    numbers, one = torch.tensor([1.0, 2.0, -3.0]), torch.eye(4)
    wanted = numbers[:, None, None] * (x @ x.mT - 2 * add + 3 * one)
    torch.testing.assert_close(symmetric(x, None, add, numbers, -2 * numbers, 3 * numbers), wanted)
    torch.testing.assert_close(symmetric(x, diagonal=2.0), x @ x.mT + 2 * one)


@on_gpu
def test_norm_of_many_tensors_is_exact_and_repeatable() -> None:
    tensors = [torch.randn(n, device="cuda") for n in (1, 5, 65536, 65537, 10**7, *[1024] * 300)]
    wanted = torch.stack([t.double().norm() for t in tensors]).norm()
    computed = total_norm(tensors)
    assert abs(computed.item() / wanted.item() - 1) < 2e-7 and all(torch.equal(computed, total_norm(tensors)) for _ in range(3))
    tensors[2][3] = torch.nan
    assert total_norm(tensors).isnan()


@on_gpu
def test_clipping_inside_the_fused_step_is_clipping_before_it() -> None:
    """What torch's fused kernel divides by as it reads: weights and moments to the rounding of a division."""
    made = []
    for inside in (False, True):
        torch.manual_seed(0)
        weights = [torch.randn(1000, 33, device="cuda", requires_grad=True) for _ in range(3)]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=True)
        for _ in range(3):
            for w in weights:
                w.grad = torch.randn_like(w)
            norm = total_norm([w.grad for w in weights])
            if inside:
                optimizer.grad_scale = ((norm + 1e-6) / 1.0).clamp(min=1.0)
            else:
                torch.nn.utils.clip_grads_with_norm_(weights, 1.0, norm)
            optimizer.step()
        made.append([w.detach() for w in weights] + [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")])
    torch.testing.assert_close(made[0], made[1], atol=1e-7, rtol=1e-5)


@on_gpu
def test_a_step_of_adamw_is_torchs() -> None:
    """Against torch's plain step in fp64, over steps, sizes of one and more turns, and a parameter that begins later; gradients stay as they are."""
    made = []
    for ours in (False, True):
        torch.manual_seed(0)
        dtype = torch.float32 if ours else torch.float64
        weights = [torch.randn(n, device="cuda").to(dtype).requires_grad_() for n in (1, 7, 8192, 8193, 1 << 20)]
        groups = [{"params": weights[:3]}, {"params": weights[3:], "weight_decay": 0.0}]
        kind: Any = SkippableAdamW if ours else torch.optim.AdamW
        optimizer = kind(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=ours)
        for step in range(5):
            for w in weights if step else weights[1:]:
                gradient = torch.randn(w.shape, device="cuda")
                w.grad = gradient.clone() if ours else gradient.double() / 2.5
            if ours:
                assert takes([w.grad for w in weights if w.grad is not None])
                optimizer.grad_scale = torch.tensor(2.5, device="cuda")
            optimizer.step()
        assert not ours or torch.equal(weights[-1].grad, gradient)
        for divisor in (torch.nan, torch.inf) if ours else ():  # the step is left out, its count too
            optimizer.grad_scale = torch.tensor(divisor, device="cuda")
            optimizer.step()
        made.append(  # the count of steps of torch's plain optimizer lies on the host
            [w.detach().double() for w in weights]
            + [s[k].double().cuda() for s in optimizer.state.values() for k in ("step", "exp_avg", "exp_avg_sq")]
        )
    torch.testing.assert_close(made[1], made[0], atol=1e-6, rtol=1e-5)


@on_gpu
@pytest.mark.parametrize("kind", left_out_cases.KINDS)
def test_a_step_that_is_left_out_is_as_if_it_had_not_been(kind: str) -> None:
    left_out_cases.a_step_leaves_itself_out(kind, "cuda")
    left_out_cases.a_step_is_made_whose_divisor_would_overflow(kind, "cuda")


@on_gpu
@pytest.mark.parametrize("K, R, C, side", [(5, 1024, 1024, 1), (3, 2816, 1024, 1), (8, 256, 768, 3), (2, 33, 52, 1), (1, 7, 5, 1)])
def test_ends_of_a_step_of_muon(K: int, R: int, C: int, side: int) -> None:
    g, m, w = ([torch.randn(R, C, device="cuda") for _ in range(K)] for _ in range(3))
    momenta, fine, divisor = torch.stack(m), torch.stack(m).double(), torch.tensor(2.5, device="cuda")
    firsts = [0] * K
    x, norms = momentum_and_update(g, firsts, momenta, 0.95, True, side, torch.bfloat16, divisor)
    wanted = reference.momentum_and_update([t.double() for t in g], firsts, fine, 0.95, True, side, torch.float64, divisor.double())
    if norms is not None:
        torch.testing.assert_close(norms.double(), wanted.norm(dim=(1, 2)), atol=0, rtol=1e-6)
    torch.testing.assert_close(momenta.double(), fine, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x.double(), wanted, atol=1e-2, rtol=4e-3)
    bad, kept = torch.tensor(torch.nan, device="cuda"), [t.clone() for t in (momenta, *w)]
    momentum_and_update(g, firsts, momenta, 0.95, True, side, torch.bfloat16, bad)
    take_step(w, firsts, (R, C), x, 0.99, 0.3, side, bad)
    assert all(torch.equal(a, b) for a, b in zip(kept, (momenta, *w))) or not muon_kernels_take([*g, momenta], firsts)
    moved = [t.double() for t in w]
    reference.take_step(moved, firsts, (R, C), x.double(), 0.99, 0.3, side)
    take_step(w, firsts, (R, C), x, 0.99, 0.3, side)
    torch.testing.assert_close([t.double() for t in w], moved, atol=1e-6, rtol=1e-6)


def _each(gram: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """(R^2 - R + 2) times a number for each R."""
    fine = gram.double()
    return (numbers[:, None, None] * (fine @ fine - fine + 2 * torch.eye(fine.shape[1], device="cuda"))).to(gram.dtype)


@on_gpu
@pytest.mark.parametrize("K, M, N, flipped", [(7, 1024, 1024, False), (3, 1024, 2816, True), (2, 256, 64, False), (5, 2048, 5632, False)])
def test_symmetric_products(K: int, M: int, N: int, flipped: bool) -> None:
    x = torch.randn(K, M, N, device="cuda").bfloat16() / N**0.5
    x = x.mT.contiguous().mT if flipped else x
    assert use_triton(x)
    gram = symmetric(x)
    fine = x.double() @ x.double().mT
    assert torch.equal(gram[:, :128, 128:], gram.mT[:, :128, 128:])
    assert ((gram - fine).abs() <= 4e-3 * fine.abs() + 1e-4).all()
    near, wanted = symmetric(gram, None, gram, 2.0, -4.8), 2.0 * gram.double() @ gram.double() - 4.8 * gram.double()
    assert ((near - wanted).abs() <= 4e-3 * wanted.abs() + 1e-3).all()
    assert torch.equal(symmetric(x), gram), "not repeatable"
    each = torch.arange(1.0, K + 1, device="cuda")
    torch.testing.assert_close(symmetric(gram, None, gram, each, -each, 2 * each), _each(gram, each), atol=0.1, rtol=1e-2)
    commuting = symmetric(gram, near, gram, 1.0, 3.4)
    assert (commuting - (gram.double() @ near.double() + 3.4 * gram.double())).norm() <= 4e-3 * commuting.double().norm()


@on_gpu
@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("rows, columns", [(1024, 1024), (2816, 1024), (256, 256), (32, 1024)])
def test_updates_in_16_bits_are_orthogonal_enough(rows: int, columns: int, steps: int) -> None:
    x = torch.randn(4, rows, columns, device="cuda")
    low, fine = orthogonalized(x.bfloat16(), steps, torch.float16), orthogonalized(x.double(), steps)
    assert (low - fine).norm() < 0.02 * fine.norm()
    values = torch.linalg.svdvals(low.float())
    assert values.max() < (1.3 if steps > 3 else 1.35) and values.median() > 0.65
