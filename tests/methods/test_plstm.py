"""pLSTM: chunks against the plain loop, transitions that are what they are said to be, and a group that only rotations can follow."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from models import mixers
from models.mixers.plstm import plstm, rotation


def test_chunks_are_the_loop_and_stop_at_documents() -> None:
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(2, 39, 3, *shape, generator=draw, dtype=torch.float64)

    q, k, v, T = drawn(6), drawn(6), drawn(2, 3), 0.7 * drawn(2, 2)
    first = torch.randn(2, 3, 2, 6, 3, generator=draw, dtype=torch.float64)
    starts = torch.rand(2, 39, generator=draw) < 0.08
    cell, out = first, []
    for t in range(39):
        cell = torch.where(starts[:, t, None, None, None, None], 0.0, cell)
        out.append(torch.einsum("bhjkv,bhk->bhjv", cell, q[:, t]))  # read before write
        cell = torch.einsum("bhmn,bhnkv->bhmkv", T[:, t], cell) + torch.einsum("bhk,bhjv->bhjkv", k[:, t], v[:, t])
    got, last = plstm(q, k, v, T, first, starts)
    torch.testing.assert_close(got, torch.stack(out, 1))
    torch.testing.assert_close(last, cell)


def test_rotations_are_orthogonal_and_the_matrix_exponential() -> None:
    angles = torch.randn(50, 6, dtype=torch.float64)
    skew = torch.zeros(50, 4, 4, dtype=torch.float64)
    row, column = torch.triu_indices(4, 4, 1)
    skew[:, row, column] = torch.pi * torch.tanh(angles)
    torch.testing.assert_close(rotation(angles, 4), torch.matrix_exp(skew - skew.mT), atol=1e-6, rtol=1e-5)
    turned = rotation(angles.float(), 4)
    torch.testing.assert_close(turned @ turned.mT, torch.eye(4).expand(50, 4, 4), atol=1e-5, rtol=0)


def test_transitions_can_be_a_group_that_does_not_commute_and_diagonal_ones_cannot() -> None:
    """Parity needs a transition of -1, S3 two that do not commute. The six elements as matrices, on the plane that they leave."""
    plane = torch.tensor([[1, -1, 0], [1, 1, -2]], dtype=torch.float64)
    plane = plane / plane.norm(dim=1, keepdim=True)
    wanted = [plane @ torch.eye(3, dtype=torch.float64)[list(p)] @ plane.T for p in itertools.permutations(range(3))]
    errors = {}
    for orthogonal in (True, False):
        torch.manual_seed(0)
        mixer: Any = mixers.build({"type": "plstm", "n_heads": 1, "transition": 2, "orthogonal": orthogonal}, 4, 0)
        mixer.init_weights(0.1, 0)
        mixer.double()
        columns = 4 if orthogonal else 2
        fitted = []
        for target in wanted:
            rates = torch.randn(4, 1, columns, dtype=torch.float64).requires_grad_()  # four beginnings
            optimizer = torch.optim.Adam([rates], lr=0.08)
            for _ in range(100):
                error = (mixer.transitions(rates)[:, 0, 0] - target).square().sum((-2, -1))
                optimizer.zero_grad()
                error.sum().backward()
                optimizer.step()
            fitted.append(float(error.min().detach()))
        errors[orthogonal] = max(fitted)
    assert errors[True] < 1e-2 and errors[False] > 0.5, errors


def test_no_transition_grows_and_gradients_reach_far_back() -> None:
    torch.manual_seed(0)
    mixer: Any = mixers.build({"type": "plstm", "n_heads": 2}, 16, 0)
    mixer.init_weights(1.0, 0)
    x = torch.randn(1, 512, 16, requires_grad=True)
    rates = mixer.conv(torch.nn.functional.linear(x, mixer.in_proj.weight), 16, None, None)[2]
    assert torch.linalg.svdvals(mixer.transitions(rates)).max() < 1 + 1e-5
    with torch.no_grad():
        mixer.in_proj.weight[64:] = 0  # the same transition for all tokens
        mixer.transition_bias[:, :4] = 3.0  # of which every singular value is one
        mixer.transition_bias[:, 4:] = torch.randn(2, 12)
    (gradient,) = torch.autograd.grad(mixer(x)[0][:, -1].sum(), x)
    size = gradient[0].norm(dim=-1)
    assert 0.2 < size[:64].mean() / size[-72:-8].mean() < 5
