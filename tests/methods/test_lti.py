"""State spaces that do not depend on the token, against dense matrices, the past they are to remember, and input sampled half as often."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models import mixers
from scripts.studies.methods.lti import delay_error, smooth


def built(D: int, **values: Any) -> Any:
    torch.manual_seed(0)
    mixer = mixers.build({"type": "lti", **values}, D, 0)
    mixer.init_weights(0.3, 0)
    return mixer.double().eval()


def walked(A: Tensor, B: Tensor, C: Tensor, u_TM: Tensor, discretization: str) -> Tensor:
    """y (T, outputs) of x' = A x + B u, y = C x, sampled with a step of one, token by token with dense matrices."""
    eye = torch.eye(len(A), dtype=A.dtype)
    if discretization == "zoh":
        A_bar = torch.matrix_exp(A)
        B_bar = torch.linalg.solve(A, (A_bar - eye) @ B)
    else:
        share = {"bilinear": 0.5, "backward": 1.0}[discretization]
        below = torch.linalg.inv(eye - share * A)
        A_bar, B_bar = below @ (eye + (1 - share) * A), below @ B
    x, out = torch.zeros(len(A), dtype=A.dtype), []
    for u in u_TM:
        x = A_bar @ x + B_bar @ u.to(A.dtype)
        out.append((C @ x).real)
    return torch.stack(out)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear", "backward"])
@pytest.mark.parametrize("kind", ["s4d", "s5", "lssl"])
def test_the_convolution_is_the_recurrence_of_the_dense_matrices(kind: str, discretization: str) -> None:
    D, T = 3, 37
    mixer = built(D, kind=kind, d_state=8, discretization=discretization)
    u = torch.randn(1, T, D, dtype=torch.float64)
    dt, got = mixer.steps(), (mixer.read(u)[0] - mixer.D * u)[0]
    if kind == "s5":
        A = torch.diag(torch.complex(-torch.exp(mixer.A_log), mixer.A_im))
        B, C = (torch.complex(*w.chunk(2, axis)) for w, axis in ((mixer.B_proj.weight, 0), (mixer.C_proj.weight, 1)))
        wanted = walked(A * dt, B * dt[:, None], C.conj(), u[0], discretization)  # C_proj holds (Re, -Im), so that reading is Re(C x)
        torch.testing.assert_close(got, wanted)
        return
    parts = []
    for d in range(D):
        if kind == "lssl":
            A, B, C = mixer.A_NN, mixer.B_N, mixer.C_DN[d]
        else:
            A = torch.diag(torch.complex(-torch.exp(mixer.A_log[d]), mixer.A_im[d]))
            B, C = torch.ones(4, dtype=A.dtype), 2 * torch.view_as_complex(mixer.C_DP2[d])
        parts.append(walked(A * dt[d], B[:, None] * dt[d], C[None], u[0, :, d : d + 1], discretization))
    torch.testing.assert_close(got, torch.cat(parts, 1))


def test_a_state_of_hippo_holds_the_past_and_real_exponentials_do_not() -> None:
    """The delay task of the papers: what the input was a while ago, read linearly from the state."""
    for kind in ("s4d", "s5", "lssl"):
        assert delay_error(kind, N=64, delay=40) < 0.06, kind
    assert delay_error("s4d", N=64, delay=40, init="real") > 0.3


@pytest.mark.parametrize("kind", ["s4d", "s5", "lssl"])
def test_twice_the_step_reads_input_sampled_half_as_often(kind: str) -> None:
    u = smooth(400, 40.0, torch.Generator().manual_seed(0))[None, :, None].expand(1, 400, 4)
    base = {"kind": kind, "d_state": 8, "discretization": "bilinear", "dt_min": 0.002, "dt_max": 0.02}
    whole = built(4, **base)(u)[0][:, ::2]
    half, same = (built(4, **base, dt_scale=scale)(u[:, ::2])[0] for scale in (2.0, 1.0))

    def off(y: Tensor) -> float:
        return float((y - whole).norm() / whole.norm())

    assert off(half) < 0.05 and off(same) > 2 * off(half)


def test_a_gate_is_a_step_size() -> None:
    """x' = -x + u by backward Euler with a step of exp(z) is (1 - g) x + g u with g = sigmoid(z): minGRU's update."""
    mixer = built(1, kind="lssl", d_state=2, discretization="backward")
    with torch.no_grad():
        mixer.A_NN.copy_(-torch.eye(2))
        mixer.B_N.fill_(1)
        mixer.log_dt.fill_(0.7)
    A, B = mixer.sampled_dense()
    gate = 1 / (1 + math.exp(-0.7))
    torch.testing.assert_close(A[0], (1 - gate) * torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(B[0], torch.full((2,), gate, dtype=torch.float64))
