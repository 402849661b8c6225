"""Runs the kernels of optimizers (lists of tensors, symmetric products) in Triton's interpreter and compares them with float64.
Its own process: the interpreter is chosen when Triton is imported. `python -m tests.kernels.interpreted_lists`"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from kernels import symmetric as symmetric_module  # noqa: E402
from kernels import tensor_lists  # noqa: E402
from kernels.float8 import E4M3, E5M2, quantised  # noqa: E402
from kernels.float8 import reference as float8_reference  # noqa: E402
from kernels.symmetric import symmetric  # noqa: E402
from kernels.symmetric import triton as symmetric_kernel  # noqa: E402
from kernels.tensor_lists import momentum_and_update, reference, scaled, take_step, total_norm, triton  # noqa: E402
from tests.kernels import left_out_cases  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402


def norms() -> None:
    """Sizes below, at and above a block and a chunk; the same bits twice; what is not finite stays so; an empty tensor counts nothing."""
    sizes = (1, 3, 4096, 4097, triton.CHUNK, triton.CHUNK + 5, 2 * triton.CHUNK)
    tensors = [torch.randn(n) * 10 ** torch.randn(()) for n in sizes] + [torch.zeros(0), torch.randn(3, 5, 7)]
    assert tensor_lists.use_triton(tensors)
    wanted = torch.stack([t.double().norm() for t in tensors]).norm()
    computed = total_norm(tensors)
    assert computed.dtype == torch.float32 and abs(computed.item() / wanted.item() - 1) < 3e-7
    assert torch.equal(computed, total_norm(tensors))
    for bad in (torch.inf, torch.nan):
        tensors[3][4096] = bad
        assert not total_norm(tensors).isfinite()
    odd = torch.randn(9)[1:]  # begins beside the 16 bytes
    assert not tensor_lists.use_triton([odd]) and not tensor_lists.use_triton([torch.randn(4).double()])
    torch.testing.assert_close(total_norm([odd]), odd.norm())


def quantising() -> None:
    """Matrices below and beside each other, columns of a wider one, magnitudes down to numbers that 8 bits hold at even distances, halves between two
    numbers, what is not finite, zeros: the bits of torch's own conversion, both ways round."""
    wide, halves = torch.randn(20, 60), torch.arange(-64, 64).view(8, 16) / 16 * 2.0 ** torch.arange(-12, 4)
    for dtype in (E4M3, E5M2):
        for pieces, beside in (
            ([torch.randn(20, 36) * 10 ** (2 * torch.randn(36))], False),
            ([torch.randn(8, 48), 3 * torch.randn(12, 48)], False),
            ([torch.randn(17, 8), torch.randn(7, 8).bfloat16()], False),
            ([wide[:, 7:31], torch.randn(20, 16).half()], True),
            ([torch.cat([halves, torch.full((4, 16), torch.finfo(dtype).max)])], False),
            ([torch.tensor([[torch.nan, 1.0, -0.0, 3.0], [-torch.inf, 2.0, -1e-9, 0.0]] * 2)], False),
            ([torch.zeros(4, 8)], False),
        ):
            found, wanted = quantised(pieces, dtype, beside), float8_reference.quantised(pieces, dtype, beside)
            assert torch.equal(found.step, wanted[2])
            assert torch.equal(found.rows.view(torch.uint8), wanted[0].view(torch.uint8))
            assert torch.equal(found.columns.view(torch.uint8), wanted[0].view(torch.uint8).T)


def ends_of_a_step() -> None:
    for K, R, C, side, nesterov, dtype in (
        (3, 8, 12, 1, True, torch.float32),
        (2, 16, 24, 3, True, torch.bfloat16),
        (1, 1, 4, 1, False, torch.float32),
        (2, 40, 60, 5, False, torch.float32),
        (1, 36, 48, 1, True, torch.bfloat16),
    ):
        g, m, w = ([torch.randn(R, C) for _ in range(K)] for _ in range(3))
        divisor = torch.tensor(2.5) if K > 1 else None
        momenta, fine = torch.stack(m), torch.stack(m).double()
        assert tensor_lists.use_triton([*g, momenta])
        firsts = [0] * K
        x, norms = momentum_and_update(g, firsts, momenta, 0.95, nesterov, side, dtype, divisor)
        wide = None if divisor is None else divisor.double()
        wanted = reference.momentum_and_update([t.double() for t in g], firsts, fine, 0.95, nesterov, side, torch.float64, wide)
        assert (norms is None) == (side > 1)
        if norms is not None:
            torch.testing.assert_close(norms.double(), wanted.norm(dim=(1, 2)), atol=0, rtol=1e-6)
        torch.testing.assert_close(momenta.double(), fine, atol=1e-6, rtol=1e-6)
        close = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 8e-3}
        assert x.dtype == dtype and x.shape == (K * side, R, C // side)
        torch.testing.assert_close(x.double(), wanted, **close)
        scale = 10.0 ** torch.arange(-2.0, len(x) - 2)
        torch.testing.assert_close(
            scaled(x, scale, torch.float16), (x.float() * scale[:, None, None]).half(), atol=1e-7, rtol=1e-3
        )  # the interpreter may round otherwise
        moved = [t.double() for t in w]
        reference.take_step(moved, firsts, (R, C), x.double(), 0.99, 0.3, side)
        take_step(w, firsts, (R, C), x, 0.99, 0.3, side)
        torch.testing.assert_close([t.double() for t in w], moved, atol=1e-6, rtol=1e-6)
        print(f"ends of a step {(K, R, C, side)}")


def symmetric_products() -> None:
    """Both ways of lying in memory, one and several matrices, two to four tiles a side; in fp16, as the interpreter multiplies bf16 as integers."""
    for K, M, N, flipped, described in (
        (2, 256, 64, False, False),
        (1, 384, 128, True, False),
        (2, 512, 64, False, True),
        (2, 256, 128, True, True),
    ):

        def takes(device: torch.device, answer: bool = described) -> bool:
            return answer

        symmetric_kernel._takes_descriptors = takes
        x = torch.randn(K, M, N).half()
        x = x.mT.contiguous().mT if flipped else x
        assert symmetric_module.use_triton(x)
        gram = symmetric(x)
        fine = x.double() @ x.double().mT
        beside = slice(0, 128), slice(128, None)  # tiles off the diagonal are the mirror images of each other to the bit
        assert gram.dtype == x.dtype and all(torch.equal(g[beside], g.mT[beside]) for g in gram)
        assert (gram - fine).abs().max() <= 1e-3 * fine.abs().max()
        gram /= 16
        near = symmetric(gram, None, gram, 0.5, -2.0)
        wanted = 0.5 * gram.double() @ gram.double().mT - 2.0 * gram.double()
        assert all(torch.equal(n[beside], n.mT[beside]) for n in near) and (near - wanted).norm() <= 1e-3 * wanted.norm(), f"{(K, M, N)}"
        each, fine = torch.arange(1.0, K + 1), gram.double()
        scaled = symmetric(gram, None, gram, 0.5 * each, -2.0 * each, each)
        wanted = each[:, None, None] * (wanted + torch.eye(M))
        assert all(torch.equal(n[beside], n.mT[beside]) for n in scaled) and (scaled - wanted).norm() <= 1e-3 * wanted.norm()
        print(f"symmetric {(K, M, N)}")


def steps_of_adamw() -> None:
    """Against torch's plain step in fp64: sizes below, at and above a turn and a program's share, a parameter that begins later, weights from afar."""
    from training.optim import SkippableAdamW

    made = []
    for ours in (False, True):
        torch.manual_seed(0)
        sizes = (1, 7, triton.TURN, triton.MOVED, triton.MOVED + 9)
        weights = [torch.randn(n).to(torch.float32 if ours else torch.float64).requires_grad_() for n in sizes]
        groups = [{"params": weights[:3]}, {"params": weights[3:], "weight_decay": 0.0}]
        kind = SkippableAdamW if ours else torch.optim.AdamW
        optimizer = kind(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=ours)
        for step in range(3):
            given = []
            if ours and step == 1:
                optimizer.prepare()  # with the gradients of the step before, which are not those of the next
            for w in weights if step else weights[1:]:
                given.append(torch.randn(w.shape))
                w.grad = given[-1].clone() if ours else given[-1].double() / (2.5 if step else 1.0)
            if ours:
                optimizer.grad_scale = torch.tensor(2.5) if step else None
            if ours and step == 2:
                optimizer.prepare()
                assert optimizer._ready is not None and all(r.is_of(g) for r, g in zip(optimizer._ready, optimizer.param_groups))
            optimizer.step()
        if ours:
            before = [t.clone() for w in weights for t in (w.detach(), *optimizer.state[w].values())]
            for divisor in (torch.nan, torch.inf):  # the step is left out, its count too
                optimizer.grad_scale = torch.tensor(divisor)
                optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(before, [t for w in weights for t in (w.detach(), *optimizer.state[w].values())]))
            assert all(torch.equal(w.grad, g) for w, g in zip(weights, given)) and optimizer._kernels_take()
            assert not SkippableAdamW(weights, lr=1e-2, fused=False)._kernels_take(), "its counts of steps lie on the CPU, always"
        made.append(
            [w.detach().double() for w in weights]
            + [s[k].double() for s in optimizer.state.values() for k in ("step", "exp_avg", "exp_avg_sq")]
        )
    torch.testing.assert_close(made[1], made[0], atol=1e-6, rtol=1e-5)


def whole_steps() -> None:
    """MuonWithAdamW through the kernels against its own plain torch."""
    from torch import nn

    from models.init import tag
    from training.optim.muon import MuonWithAdamW

    def made() -> nn.ParameterDict:
        torch.manual_seed(1)
        model = nn.ParameterDict({"a": nn.Parameter(torch.randn(16, 12)), "b": nn.Parameter(torch.randn(16, 12))})
        model["c"] = tag(nn.Parameter(torch.randn(2, 8, 24)), splits=[8, 8, 8])
        model["d"] = tag(nn.Parameter(torch.randn(24, 12)), splits=[16, 8])
        model["e"] = tag(nn.Parameter(torch.randn(7)), "no_decay")
        return model

    results: list[list[Tensor]] = []
    for kernels in ("1", "0"):
        os.environ["TRITON_INTERPRET"] = kernels
        model = made()
        muon = MuonWithAdamW(model, lr=1e-2, muon_lr=2e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for seed in range(2):
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            muon.step()
        results.append([p.detach() for p in model.parameters()])
    os.environ["TRITON_INTERPRET"] = "1"
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-4)


def steps_left_out() -> None:
    for kind, limit in zip(left_out_cases.KINDS, (0.5, 0.0), strict=True):
        left_out_cases.a_step_leaves_itself_out(kind, "cpu", (limit,), left_out_cases.BAD[::3])
        left_out_cases.a_step_is_made_whose_divisor_would_overflow(kind, "cpu")


if __name__ == "__main__":
    patch_once()
    for part in (norms, quantising, ends_of_a_step, symmetric_products, steps_of_adamw, whole_steps, steps_left_out):
        torch.manual_seed(0)
        part()
    print("ok")
