"""Sequence parallelism: one layer over a sequence whose time is cut into equal slices, one on each rank of a process group.

Recurrences exchange border values only, whatever the length: nonlinear cells their end states and the products of their Jacobians (multiple
shooting with one slice a rank, certified at the borders), Mamba-2 its states and decays, convolutions their last inputs. Attention gathers
keys and values. Gradients of parameters are those of this rank's slice: sum them over the group.

Legend: B batch, T time of a slice, N ranks, D width, S states of a cell, W convolution width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.parallel_rnn import parallel_rnn, reference
from kernels.ssd import ssd
from models.contract import SequenceMixer, document_starts
from models.layers import rotate

traffic = {"bytes": 0}  # received by this process since it was last set to zero


def _all(value: Tensor, group: Any) -> Tensor:
    """(N, ...): the tensors of all ranks, without a graph."""
    value = value.detach().contiguous()
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value, group=group)
    traffic["bytes"] += value.nbytes * (len(parts) - 1)
    return torch.stack(parts)


class _Gather(torch.autograd.Function):
    """`_all` with a gradient: what all ranks ask of this rank's value. Every rank must keep the result in its graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all(value, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        traffic["bytes"] += total.nbytes
        return total[dist.get_rank(ctx.group)], None


def starts_of(segment_ids: Tensor | None, group: Any) -> Tensor | None:
    """document_starts of this slice, the slice before it considered."""
    if segment_ids is None:
        return None
    rank, last_NB = dist.get_rank(group), _all(segment_ids[:, -1], group)
    return document_starts(segment_ids, last_NB[rank - 1] if rank else segment_ids[:, 0])


def halo(x_BTD: Tensor, width: int, segment_ids: Tensor | None, group: Any) -> Tensor:
    """The last width-1 inputs of the slice before, zero where they belong to an earlier document than its last token."""
    if x_BTD.shape[1] < width - 1:
        raise ValueError(f"A slice of {x_BTD.shape[1]} tokens is shorter than the {width - 1} a convolution looks back; use fewer ranks.")
    tail = x_BTD[:, x_BTD.shape[1] - width + 1 :]
    if segment_ids is not None:
        tail = tail * (segment_ids[:, segment_ids.shape[1] - width + 1 :] == segment_ids[:, -1:])[..., None]
    gathered, rank = _Gather.apply(tail, group), dist.get_rank(group)
    return gathered[rank - 1] if rank else gathered[0] * 0


class _Across(torch.autograd.Function):
    """States (B, T, S, D) of this rank's slice of one long recurrence."""

    @staticmethod
    def forward(ctx: Any, cell: Any, pre: Tensor, rec: Tensor, starts: Tensor | None, group: Any) -> Tensor:
        rank, N = dist.get_rank(group), dist.get_world_size(group)
        dtype = reference.compute_dtype(pre)
        start = pre.new_zeros(pre.shape[0], N, len(cell.state), pre.shape[-1], dtype=dtype)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        for correction in range(N):
            h0 = start[:, rank].contiguous()
            states, final = parallel_rnn(cell, pre, rec, h0, starts)
            J = _jacobians(cell, pre, rec, h0, starts, states)
            both = _all(torch.cat([final.to(dtype)[:, None], reference.product(J[:, None])[:, 0]], 1), group).transpose(0, 1)
            end, P = both[:, :, 0], both[:, :, 1:]
            gap = ((start[:, 1:] - end[:, :-1]).abs() / (1 + end[:, :-1].abs())).nan_to_num(nan=torch.inf)
            if correction == N - 1 or not gap.numel() or float(gap.max()) <= tolerance:
                break  # all ranks hold the same numbers, so all stop together; N - 1 corrections make every slice exact
            start = reference.corrected(end, P, start)
        ctx.save_for_backward(pre, rec, h0, states, *(() if starts is None else (starts,)))
        ctx.cell, ctx.group = cell, group
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        pre, rec, h0, states, *rest = ctx.saved_tensors
        starts, dtype = rest[0] if rest else None, h0.dtype
        rank, N = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        J = _jacobians(ctx.cell, pre, rec, h0, starts, states)
        d_states = gradients[0].to(dtype)
        _, local = reference.adjoints(J, d_states, torch.zeros_like(h0), None)
        both = _all(torch.cat([local[:, None], reference.product(J[:, None])[:, 0]], 1), ctx.group)
        carried = torch.zeros_like(h0)
        for n in range(N - 1, rank, -1):
            carried = both[n, :, 0] + (both[n, :, 1:] * carried[:, :, None]).sum(1)
        w, x = rec.to(dtype), pre.to(dtype)
        d_pre, d_rec, _ = reference.linear_backward(ctx.cell, x, w, h0, starts, states.to(dtype), d_states, carried)
        return None, d_pre.to(pre.dtype), d_rec.to(rec.dtype), None, None


def _jacobians(cell: Any, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, states: Tensor) -> Tensor:
    dtype = h0.dtype
    J = reference.jacobian(cell, pre.to(dtype), rec.to(dtype), reference.previous(states.to(dtype), h0, starts))
    return J if starts is None else J * (~starts[:, :, None, None, None]).to(dtype)


def _rnn(mixer: Any, x_BTD: Tensor, segment_ids: Tensor | None, group: Any) -> Tensor:
    if reference.mixes_channels(mixer.cell):
        raise ValueError(f"Cell {mixer.cell.name} mixes channels in its state, so its time cannot be split over ranks.")
    projected = mixer.in_proj(x_BTD)
    u, gate = projected.chunk(2, -1) if mixer.config.gate else (projected, None)
    starts = starts_of(segment_ids, group)
    if mixer.conv is not None:
        u = F.silu(mixer.conv(u, halo(u, mixer.conv.width, segment_ids, group), starts)[0])
    pre = mixer._project(u)
    with torch.autocast(x_BTD.device.type, enabled=False):
        h = _Across.apply(mixer.cell, pre, mixer.recurrent_weights(), starts, group)[:, :, -1]
    h = mixer.norm(h) if mixer.norm is not None else h
    return mixer.out_proj(h if gate is None else h * F.silu(gate))


def _mamba2(mixer: Any, x_BTD: Tensor, segment_ids: Tensor | None, group: Any) -> Tensor:
    c = mixer.config
    z, xBC, dt = mixer.in_proj(x_BTD).split([mixer.inner, mixer.inner + 2 * mixer.BC, mixer.H], -1)
    starts = starts_of(segment_ids, group)
    xBC = F.silu(mixer.conv(xBC, halo(xBC, mixer.conv.width, segment_ids, group), starts)[0])
    x, B_, C_ = xBC.split([mixer.inner, mixer.BC, mixer.BC], -1)
    inner = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    dt = F.softplus(dt.to(inner) + mixer.dt_bias.to(inner)).clamp(c.dt_limit_min, c.dt_limit_max or math.inf)
    A = -torch.exp(mixer.A_log.to(inner))
    x, B_, C_ = x.unflatten(-1, (mixer.H, c.head_dim)), B_.unflatten(-1, (c.n_groups, c.d_state)), C_.unflatten(-1, (c.n_groups, c.d_state))
    y, end = ssd(x, dt, A, B_, C_, None, starts, chunk=c.chunk)
    left = torch.exp((dt * A).cumsum(1))  # what is left of the state before the slice, (B, T, H)
    if starts is not None:
        left = left * (starts.cumsum(1) == 0)[..., None]
    both = _Gather.apply(torch.cat([end.flatten(2), left[:, -1, :, None]], -1), group)
    before = [both[0, ..., :-1] * 0]
    for n in range(both.shape[0] - 1):
        before.append(both[n, ..., -1:] * before[-1] + both[n, ..., :-1])
    h0 = torch.stack(before)[dist.get_rank(group)].view_as(end)
    C_heads = C_.to(inner).repeat_interleave(mixer.H // c.n_groups, 2)
    y = y + torch.einsum("bthn,bhpn->bthp", C_heads, h0) * left[..., None] + x * mixer.D.to(inner)[:, None]
    return mixer.out_proj(mixer.norm(y.flatten(2), gate=z).to(x.dtype))


def _attention(mixer: Any, x_BTD: Tensor, segment_ids: Tensor | None, group: Any) -> Tensor:
    B, T, _ = x_BTD.shape
    rank = dist.get_rank(group)
    q = mixer.q_proj(x_BTD).view(B, T, mixer.H, mixer.K).transpose(1, 2)
    k = mixer.k_proj(x_BTD).view(B, T, mixer.G, mixer.K).transpose(1, 2)
    v = mixer.v_proj(x_BTD).view(B, T, mixer.G, mixer.K).transpose(1, 2)
    if mixer.q_norm is not None and mixer.k_norm is not None:
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    if mixer.config.rope:
        positions = torch.arange(rank * T, (rank + 1) * T, device=x_BTD.device)
        q, k = rotate(q, positions, mixer.config.rope_theta), rotate(k, positions, mixer.config.rope_theta)
    both = _Gather.apply(torch.stack([k, v.to(k.dtype)]), group)[: rank + 1]
    segments = None if segment_ids is None else torch.cat(list(_all(segment_ids, group)[: rank + 1]), 1)
    k, v = (torch.cat(list(both[:, i]), 2) for i in (0, 1))
    if mixer.config.window:
        keep = T + mixer.config.window - 1
        k, v, segments = k[:, :, -keep:], v[:, :, -keep:], None if segments is None else segments[:, -keep:]
    return mixer.o_proj(mixer._attend(q, k, v, segments).transpose(1, 2).reshape(B, T, -1))


FORWARD = {"rnn": _rnn, "mamba2": _mamba2, "attention": _attention}


def forward(mixer: SequenceMixer, x_BTD: Tensor, segment_ids: Tensor | None = None, group: Any = None) -> Tensor:
    """y (B, T, D) of this rank's slice; slices are equally long and in the order of the ranks of `group` (None: all).

    Raises ValueError for a mixer that has no such form, and for slices shorter than a convolution's history.
    """
    kind = type(mixer).__module__.rsplit(".", 1)[-1]
    if kind not in FORWARD:
        raise ValueError(f"Mixer {kind} cannot be split over ranks in time; these can: {', '.join(FORWARD)}.")
    return FORWARD[kind](mixer, x_BTD, segment_ids, group)
