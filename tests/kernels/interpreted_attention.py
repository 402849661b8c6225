"""Runs the kernels of packed attention in Triton's interpreter and compares them with a loop over queries in float64.
Its own process: the interpreter is chosen when Triton is imported. `python -m tests.kernels.interpreted_attention`"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from kernels.attention import attention, op  # noqa: E402
from models.segments import Documents  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402

# B, H, G, T, L, K, share of tokens that begin a document (None: rows are documents), window, dtype
CASES: list[tuple[int, int, int, int, int, int, float | None, int, torch.dtype]] = [
    (2, 1, 1, 37, 37, 64, 0.1, 0, torch.float32),
    (1, 2, 1, 50, 50, 24, 0.05, 9, torch.float32),  # heads that are filled up; two that share keys
    (1, 2, 1, 20, 47, 64, 0.1, 0, torch.float32),  # the last queries only
    (1, 1, 1, 33, 40, 64, None, 7, torch.float32),
    (1, 1, 1, 64, 64, 64, 0.01, 0, torch.float32),
    (1, 1, 1, 48, 48, 64, None, 0, torch.float32),
    (1, 1, 1, 33, 33, 64, 0.6, 0, torch.float16),
]


def loop(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, window: int) -> Tensor:
    """One query of one head after the other."""
    (B, H, T, K), (_, G, L, _) = q.shape, k.shape
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                place, g = t + L - T, h // (H // G)
                keys = torch.arange(place + 1)
                if segments is not None:
                    keys = keys[segments[b, : place + 1] == segments[b, place]]
                if window:
                    keys = keys[keys > place - window]
                rows.append(torch.softmax(k[b, g, keys] @ q[b, h, t] / K**0.5, 0) @ v[b, g, keys])
    return torch.stack(rows).view(B, H, T, K)


def answers(run, tensors: list[Tensor], d: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, d)]


def check(B: int, H: int, G: int, T: int, L: int, K: int, share: float | None, window: int, dtype: torch.dtype) -> None:
    tensors = [torch.randn(B, t, n, K).transpose(1, 2).to(dtype) for n, t in ((H, T), (G, L), (G, L))]
    d = torch.randn(B, H, T, K).to(dtype)
    segments = None if share is None else (torch.rand(B, L) < share).cumsum(1)
    bounds = None if segments is None else Documents(segments).bounds()
    found = answers(lambda q, k, v: attention(q, k, v, bounds, window), tensors, d)
    wanted = answers(lambda q, k, v: loop(q, k, v, segments, window), [t.double() for t in tensors], d.double())
    for name, a, b in zip(("y", "dq", "dk", "dv"), found, wanted):
        error = float((a.double() - b).norm() / b.norm())
        assert a.dtype == dtype and a.shape == b.shape
        assert error < (1e-6 if dtype == torch.float32 else 1e-3), (
            f"{(B, H, G, T, L, K, share, window, dtype)}: {name} is off by {error:.1e}"
        )
    again = answers(lambda q, k, v: attention(q, k, v, bounds, window), tensors, d)
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    assert found[0].transpose(1, 2).is_contiguous() or K not in (64, 128, 256)  # heads of a token beside each other


def not_finite() -> None:
    """A document leaves the results of the others as they are, in whichever input it is not finite, though it shares blocks with them."""
    segments = torch.zeros(2, 40, dtype=torch.int32)
    segments[:, 18:] += 1
    segments[:, 22:] += 1
    bounds = Documents(segments).bounds()
    others = torch.ones(40, dtype=torch.bool)
    others[18:22] = False
    for bad in range(4):
        tensors = [torch.randn(2, n, 40, 64) for n in (2, 1, 1, 2)]
        run = lambda *t: answers(lambda q, k, v: attention(q, k, v, bounds), list(t[:3]), t[3])  # noqa: E731
        wanted = run(*tensors)
        tensors[bad][0, 0, 20, 3] = torch.nan if bad % 2 else torch.inf
        found = run(*tensors)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a[:, :, others], b[:, :, others])
            assert torch.equal(a[1], b[1])
        assert not found[0 if bad < 3 else 1][0, 0, 20].isfinite().any(), "what sees it is lost"


def large() -> None:
    """Logits of some hundreds; a softmax that is one key's."""
    tensors = [10 * torch.randn(1, 2, 20, 64) for _ in range(2)] + [torch.randn(1, 2, 20, 64)]
    d = torch.randn(1, 2, 20, 64)
    found = answers(lambda q, k, v: attention(q, k, v, None), tensors, d)
    wanted = answers(lambda q, k, v: loop(q, k, v, None, 0), [t.double() for t in tensors], d.double())
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.double(), b, atol=1e-3, rtol=1e-3)


def registered() -> None:
    tensors = [torch.randn(1, 9, n, 64).transpose(1, 2).requires_grad_() for n in (2, 1, 1)]
    for bounds, window in ((Documents((torch.rand(1, 9) < 0.3).cumsum(1)).bounds(), 0), ((None, None), 4)):
        torch.library.opcheck(op.attention_op, (*tensors, *bounds, window, 0.125))


if __name__ == "__main__":
    import numpy

    numpy.seterr(all="ignore")
    patch_once()
    torch.manual_seed(0)
    for case in CASES:
        check(*case)
    not_finite()
    large()
    registered()
    print("ok")
