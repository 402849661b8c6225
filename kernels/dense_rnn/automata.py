"""A third way of finding the states that slices start in, for heads that behave as finite automata: maps between a few states are composed.

A head that tracks the elements of a group forgets how its start differed from the nearest of a few states within some steps, but never which
of them it was nearest to: corrections and repetition then make one slice right after the other, N - 1 times. Yet those few states can be known, as
they are met again and again. So each slice is walked from every one of them (more rows of the same product), which gives a map from the state
that it starts near to the state that it ends near. Maps compose associatively, so a scan over slices says which one each slice starts near, and
the end of the slice before, walked from there, is where it starts. A pass from these starts, repeated a few times, is certified as all solves
are, and what is not certified is walked in order, so that what comes out is never less than right.

    dictionary = Dictionary(E, 6, S, K);  dictionary.learn(borders_RSD)      # states at borders of slices, seen in earlier solves
    states_BTSD = solve(cell, pre, rec, mat, h0, starts, dictionary.states)  # plain torch; `forward` does so by the Triton kernels

It pays where rows are few and long (`dictionary.slices_for`), and only with exact trackers: `spread` says how far states met lie from the nearest
candidate, which for an automaton is nothing. Legend: as in reference.py; M candidates; dictionaries are (E, M, S, K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dense_rnn import launch, reference
from kernels.dense_rnn.dictionary import SETTLE, by_channel, by_head, distances, scale_of
from kernels.dense_rnn.reference import TOLERANCE, certified_size, local_size
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.reference import share, slice_time, zeroed
from kernels.parallel_rnn.step import HeadMatrix

REPEATS = 3  # passes after the one from composed starts


@dataclass
class Report:
    """What a solve did: slices, passes after the one from composed starts, the largest gap at a border as a share of a channel's size, and
    whether all was walked in order."""

    slices: int = 1
    repeats: int = 0
    residual: float = 0.0
    walked: bool = False


last_report = Report()


def compose(maps_BNEM: Tensor, first_BE: Tensor) -> Tensor:
    """(B, N + 1, E): where `first` is taken by the first 0, 1, .. N maps one after the other, all at once by a scan over N."""
    whole, ahead = maps_BNEM, 1
    while ahead < whole.shape[1]:
        whole = torch.cat([whole[:, :ahead], whole[:, ahead:].gather(-1, whole[:, :-ahead])], 1)
        ahead *= 2
    after = whole.gather(-1, first_BE[:, None, :, None].expand(-1, whole.shape[1], -1, 1))[..., 0]
    return torch.cat([first_BE[:, None], after], 1)


def starts_of(first_BSD: Tensor, ends_BNMSD: Tensor, candidates_BNMSD: Tensor, dictionary: Tensor) -> Tensor:
    """Starts (B, N, S, D) of slices 1 .. N, from the true end of slice 0 and what each candidate of the slices 1 .. N comes to."""
    E, S = dictionary.shape[0], dictionary.shape[2]
    scale = scale_of(dictionary.flatten(2).float())
    first, ends, candidates = (by_head(x, E) for x in (first_BSD, ends_BNMSD, candidates_BNMSD))  # (.., E, S K)

    def nearest(x: Tensor, among: Tensor) -> Tensor:  # (.., M', E, F) and (.., M, E, F): (.., E, M')
        a, b = ((v.float() / scale).transpose(-3, -2) for v in (x, among))
        return distances(a, b).argmin(-1)

    maps = nearest(ends[:, :-1], candidates[:, 1:])
    index = compose(maps, nearest(first[:, None], candidates[:, 0])[..., 0])[:, : ends.shape[1]]  # which candidate each slice starts near
    take = index[:, :-1, None, :, None].expand(-1, -1, 1, -1, ends.shape[-1])
    return torch.cat([first_BSD[:, None], by_channel(ends[:, :-1].gather(2, take)[:, :, 0], S)], 1)


def _walk_all(cell: Cell, pre: Tensor, rec: Tensor, mat: list[HeadMatrix], begins: Tensor, starts: Tensor | None) -> Tensor:
    """Ends (B, N, M, S, D) of slices pre (B, N, L, P, D) from every one of begins (B, N, M, S, D)."""
    state, weights = begins.unbind(3), rec.unbind(0)
    for t in range(pre.shape[2]):
        if starts is not None:
            state = tuple(zeroed(s, starts[:, :, t, None, None]) for s in state)
        state = tuple(cell(pre[:, :, t, None].unbind(3), weights, state, mat))
    return torch.stack(state, 3)


@torch.no_grad()
def solve(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, dictionary: Tensor, slices: int,
    settle: int = SETTLE, repeats: int = REPEATS,
) -> Tensor:  # fmt: skip
    """All states (B, T, S, D) of a lowered cell, by composed maps in plain torch; walked in order where that is not certified."""
    global last_report
    (B, T), matrix = pre.shape[:2], reference.matrices(mat)
    n, length = reference._sizes(T, slices)
    x, at = slice_time(pre, n, length), None if starts is None else slice_time(starts, n, length)
    begins = h0[:, None].expand(-1, n, -1, -1).clone()
    if n > 1:
        few = by_channel(dictionary.to(h0.dtype).flatten(2).transpose(0, 1), h0.shape[1])  # (M, S, D)
        candidates, tail = few.expand(B, n - 1, *few.shape), min(settle, length)
        if tail:
            early = None if at is None else at[:, :-1, length - tail :]
            candidates = _walk_all(cell, x[:, :-1, length - tail :], rec, matrix, candidates, early)
        ends = _walk_all(cell, x[:, 1:], rec, matrix, candidates, None if at is None else at[:, 1:])
        first = _walk_all(cell, x[:, :1], rec, matrix, h0[:, None, None], None if at is None else at[:, :1])[:, 0, 0]
        begins[:, 1:] = starts_of(first, ends, candidates, dictionary)
    for k in range(repeats + 1):
        states = reference._walk(cell, x, rec, matrix, begins, at)
        ends, size = states[:, :-1, -1], certified_size(cell, local_size(states, at)[:, :-1], TOLERANCE[pre.dtype])
        residual = share(ends - begins[:, 1:], size) if n > 1 else 0.0
        last_report = Report(n, k, residual)
        if residual == 0 or k == repeats:
            break
        begins[:, 1:] = ends
    if residual > TOLERANCE[pre.dtype]:
        last_report.walked = True
        return reference._walk(cell, pre[:, None], rec, matrix, h0[:, None], None if starts is None else starts[:, None])[:, 0]
    return states.flatten(1, 2)[:, :T]


class _Rows:
    """Launches of a cell's walk over slices from given starts; `begins` (B, n, S, D) may be changed between them."""

    def __init__(
        self, cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, plan: launch.Plan, begins: Tensor
    ) -> None:
        self.p = p = launch.Problem(cell, pre, rec, mat, h0, starts, plan, False)
        self.begins, self.ends, self.nearby = begins, torch.empty_like(begins), torch.empty_like(begins)
        self.emitted, self.kept = p.pre.new_empty(p.B, p.T, p.D), p.h0.new_empty(p.B, p.T, p.S - 1, p.D)
        self.todo = torch.ones(p.B, plan.slices, p.E, dtype=torch.int32, device=pre.device)
        self.shared = (p.at.tensor, p.rec, p.on_chip())
        self.products = p.per_slice(p.tracked)

    def walk(self) -> Tensor:
        """The ends (B, n, S, D); heads of slices that `todo` leaves out stay as they are."""
        p, tensors = self.p, (self.emitted, self.kept, self.begins, self.ends, self.products, self.nearby, self.todo)
        joins, how = p.joins(self.todo, False)
        p.module.walk[p.grid](*self.shared, p.h0, p.reset, *tensors, *joins, 0, False, False, *how, *p.sizes, **p.constants)
        return self.ends

    def finish(self, bad: Tensor, final: Tensor) -> None:
        """Walks in order from slice `bad` (B, E) on; n: nothing to do."""
        p = self.p
        p.module.finish[p.grid_in_order](*self.shared, p.reset, self.emitted, self.kept, self.ends, bad, final, *p.sizes, **p.constants)


def _from_each(cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, starts: Tensor | None, plan: launch.Plan, begins_BNMSD: Tensor) -> Tensor:
    """Ends (B, N, M, S, D) of slices of `plan` from every begin, by the kernels: a batch row at a time, whose candidates are rows that read
    the same inputs."""
    M, out = begins_BNMSD.shape[2], []
    for b in range(len(pre)):
        rows, new = pre[b].expand(M, *pre.shape[1:]), None if starts is None else starts[b].expand(M, -1)
        begins = begins_BNMSD[b].transpose(0, 1).float().contiguous()
        out.append(_Rows(cell, rows, rec, mat, begins[:, 0], new, plan, begins).walk().transpose(0, 1))
    return torch.stack(out)


@torch.no_grad()
def forward(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, dictionary: Tensor, slices: int,
    settle: int = SETTLE, repeats: int = REPEATS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """launch.forward by composed maps: (emitted (B, T, D), kept (B, T, S - 1, D), final (B, S, D), and the first slice (B, E) that was walked in
    order, the number of slices where none was). Waits for nothing."""
    B, T = pre.shape[:2]
    plan = launch.Plan.of(pre, mat.shape[1], slices, 0)
    n, L = plan.slices, plan.length
    begins = h0.float()[:, None].expand(-1, n, -1, -1).contiguous()
    if n > 1:
        few = by_channel(dictionary.float().flatten(2).transpose(0, 1), h0.shape[1])
        candidates, tail = few.expand(B, n - 1, *few.shape), min(settle, L)
        body, new = (
            pre[:, : (n - 1) * L].unflatten(1, (n - 1, L)),
            None if starts is None else starts[:, : (n - 1) * L].unflatten(1, (n - 1, L)),
        )
        if tail:
            early, at = body[:, :, L - tail :].flatten(1, 2), None if new is None else new[:, :, L - tail :].flatten(1, 2)
            candidates = _from_each(cell, early, rec, mat, at, launch.Plan(n - 1, tail, 0, plan.rows, plan.warps), candidates)
        whole = launch.Plan(n, L, 0, plan.rows, plan.warps)
        # candidates of slice 0 are the initial state alone, which all rows there walk from
        of_first = h0.float()[:, None, None].expand(B, 1, len(few), -1, -1)
        ends = _from_each(cell, pre, rec, mat, starts, whole, torch.cat([of_first, candidates], 1))
        begins[:, 1:] = starts_of(ends[:, 0, 0], ends[:, 1:], candidates, dictionary)
    rows = _Rows(cell, pre, rec, mat, h0, starts, plan, begins)
    E = mat.shape[0]
    bad = torch.full((B, E), n, dtype=torch.int32, device=pre.device)
    ends = rows.walk()
    final = ends[:, -1].clone()
    if n == 1:
        return rows.emitted, rows.kept, final, bad
    for _ in range(repeats):
        rows.todo[:, 1:] = (ends[:, :-1] != begins[:, 1:]).unflatten(3, (E, -1)).any(4).any(2)
        rows.todo[:, 0] = 0
        begins[:, 1:] = ends[:, :-1]
        rows.walk()
    change, size = ends[:, :-1] - begins[:, 1:], certified_size(cell, rows.nearby[:, :-1], TOLERANCE[pre.dtype])
    gap = torch.where(change == 0, 0.0, (change.abs() / size).nan_to_num(torch.inf, torch.inf)).unflatten(3, (E, -1)).amax((2, 4))
    differs = torch.cat([(change != 0).unflatten(3, (E, -1)).any(4).any(2), torch.ones_like(gap[:, :1], dtype=torch.bool)], 1)
    earliest = differs.int().argmax(1) + 1  # the first slice that does not begin where the one before it ends, or n
    bad.copy_(torch.where(gap.amax(1) > TOLERANCE[pre.dtype], earliest, n))
    final.copy_(ends[:, -1])
    rows.finish(bad, final)
    return rows.emitted, rows.kept, final, bad


def slices_of(pre: Tensor, mat: Tensor, slices: int) -> int:
    """Slices that `forward` makes where so many are asked for."""
    return launch.Plan.of(pre, mat.shape[1], slices, 0).slices
