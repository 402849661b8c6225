"""The delta rule in plain torch: the recurrence itself as the oracle, one decoding step, and the chunked form (matrix products inside chunks).

A token makes n updates of the state, one a sub-step s = t n .. t n + n - 1; the gate acts before the first, the output is read after the last.

Legend: B batch, T tokens, S = n T sub-steps, H heads of values, G heads of queries and keys (each shared by H / G), K key width, V value width,
C chunks, Q sub-steps of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # sub-steps of a chunk
NORM_EPS = 1e-6  # added to the sum of squares under the root where queries and keys are normalised
FORGOTTEN = -87.0  # log gates from here down are those of a state that is gone: exp gives no normal number in fp32


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_norm(x: Tensor) -> Tensor:
    """x divided by its norm over the last dimension; not a number where the squares leave the dtype, as in the kernels: they would give zeros."""
    squares = x.square().sum(-1, keepdim=True)
    return x * torch.rsqrt(torch.where(squares < torch.inf, squares + NORM_EPS, torch.nan))


def delta_rule_sequential(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The definition, one update at a time, in the inputs' dtype."""
    B, T, G, K = q.shape
    H, V = v.shape[2:]
    n, repeat = k.shape[1] // max(T, 1), H // G
    if normalize:
        q, k = unit_norm(q), unit_norm(k)
    h = v.new_zeros(B, H, V, K) if h0 is None else h0
    out = []
    for t in range(T):
        if starts is not None:
            h = torch.where(starts[:, t, None, None, None], 0.0, h)
        if g is not None:
            gate = g[:, t, :, None, None]
            h = torch.where(gate == float("-inf"), 0.0, torch.exp(gate) * h)
        for s in range(t * n, t * n + n):
            key = k[:, s].repeat_interleave(repeat, 1)
            wrong = v[:, s] - (h * key[:, :, None]).sum(-1)
            h = h + (beta[:, s, :, None] * wrong)[..., None] * key[:, :, None]
        out.append((h * q[:, t].repeat_interleave(repeat, 1)[:, :, None]).sum(-1) * scale)
    return torch.stack(out, 1) if out else v.new_zeros(B, 0, H, V), h


def delta_rule_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    h0: Tensor | None,
    starts: Tensor | None,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`delta_rule_sequential` in fp32 (fp64), outputs in v's dtype."""
    dtype = _state_dtype(v.dtype)
    g, h0 = (None if t is None else t.to(dtype) for t in (g, h0))
    o, h = delta_rule_sequential(q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype), g, h0, starts, normalize=normalize, scale=scale)
    return o.to(v.dtype), h


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    h0: Tensor,
    starts: Tensor | None,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One token (T = 1) of n updates, heads grouped rather than queries and keys repeated; h0 is left as it is."""
    dtype, (B, _, G, K), (H, V) = _state_dtype(v.dtype), q.shape, v.shape[2:]
    q, k = q.to(dtype), k.to(dtype)
    if normalize:
        q, k = unit_norm(q), unit_norm(k)
    h = h0.to(dtype)
    if g is not None:
        gate = g[:, 0, :, None, None].to(dtype)
        h = torch.where(gate == float("-inf"), 0.0, h * torch.exp(gate))
    if starts is not None:
        h = torch.where(starts[..., None, None], 0.0, h)
    h = h.reshape(B, G, H // G * V, K)
    for s in range(k.shape[1]):
        key = k[:, s, :, :, None]
        wrong = v[:, s].to(dtype).reshape(B, G, H // G * V, 1) - h @ key
        step = beta[:, s].to(dtype).repeat_interleave(V, 1).view(B, G, H // G * V, 1)
        h = torch.addcmul(h, step * wrong, key.transpose(2, 3))
    o = (h @ q[:, 0, :, :, None]).view(B, 1, H, V) * scale
    return o.to(v.dtype), h.view(B, H, V, K)


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    h0: Tensor | None,
    starts: Tensor | None,
    normalize: bool = False,
    scale: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The same values (arXiv 2406.06484, 2412.06464): inside a chunk the corrected values of all updates solve one triangular system; the state
    goes from chunk to chunk."""
    dtype, (B, T, G, K), (H, V), S = _state_dtype(v.dtype), q.shape, v.shape[2:], k.shape[1]
    n, Q, repeat = S // T, min(chunk, S, CHUNK), H // G
    q, k = q.to(dtype), k.to(dtype)
    if normalize:
        q, k = unit_norm(q), unit_norm(k)
    last = torch.arange(T, device=q.device) * n + n - 1
    if n > 1:  # a query at the last sub-step of its token
        q = q.unsqueeze(2) * torch.eye(n, dtype=dtype, device=q.device)[-1, :, None, None]
        q = q.flatten(1, 2)

    def chunked(x: Tensor) -> Tensor:
        """(B, heads, C, Q, ...)."""
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, -S % Q)).unflatten(1, (-1, Q)).movedim(3, 1)

    queries, keys = (chunked(x).repeat_interleave(repeat, 1) for x in (q, k))
    values, beta_BHCQ = chunked(v.to(dtype)), chunked(beta.to(dtype))
    gate, document = _gates_of_updates(g, starts, B, T, n, H, v.device)
    total = chunked(gate).cumsum(3)  # in fp64: of a difference of sums a strong decay leaves no digits to the weak ones
    document_BHCQ = chunked(document).cumsum(3)
    places = torch.arange(Q, device=q.device)
    allowed = (document_BHCQ[..., :, None] == document_BHCQ[..., None, :]) & (places[:, None] >= places)
    decay = torch.exp((total[..., :, None] - total[..., None, :]).masked_fill(~allowed, float("-inf")).to(dtype))
    carried = torch.exp(total.masked_fill(document_BHCQ != 0, float("-inf")).to(dtype))[..., None]
    same = document_BHCQ == document_BHCQ[..., -1:]
    to_end = torch.exp((total[..., -1:] - total).masked_fill(~same, float("-inf")).to(dtype))[..., None]
    system = (beta_BHCQ[..., None] * (keys @ keys.transpose(-1, -2)) * decay).tril(-1)
    right = torch.cat([beta_BHCQ[..., None] * values, beta_BHCQ[..., None] * carried * keys], -1)
    solved = torch.linalg.solve_triangular(system + torch.eye(Q, dtype=dtype, device=q.device), right, upper=False, unitriangular=True)
    U, W = solved.split([V, K], -1)
    scores = (queries @ keys.transpose(-1, -2)) * decay
    h = v.new_zeros(B, H, V, K, dtype=dtype) if h0 is None else h0.to(dtype)
    out = []
    for c in range(U.shape[2]):
        corrected = U[:, :, c] - W[:, :, c] @ h.transpose(-1, -2)
        out.append(carried[:, :, c] * (queries[:, :, c] @ h.transpose(-1, -2)) + scores[:, :, c] @ corrected)
        h = carried[:, :, c, -1, :, None] * h + corrected.transpose(-1, -2) @ (to_end[:, :, c] * keys[:, :, c])
    o = torch.stack(out, 2).flatten(2, 3).transpose(1, 2)[:, :S]
    return (o[:, last] * scale).to(v.dtype), h


def _gates_of_updates(
    g: Tensor | None, starts: Tensor | None, B: int, T: int, n: int, H: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(logarithms of the gates in fp64, whether the state before is left out), (B, S, H), at the first sub-step of each token. A gate that leaves
    nothing is said by the second: its logarithm has no sum."""
    gate = torch.zeros(B, T, H, dtype=torch.float64, device=device) if g is None else g.double()
    new = gate < FORGOTTEN
    gate = torch.where(new, 0.0, gate)
    if starts is not None:
        new = new | starts[..., None]
    left = new.int()  # before it is filled up: of padded comparisons in fp64 torch 2.13's compiler makes C++ that does not compile
    if n > 1:
        gate, left = (F.pad(x.unsqueeze(2), (0, 0, 0, n - 1)).flatten(1, 2) for x in (gate, left))
    return gate, left


def delta_rule(
    q_BTGK: Tensor,
    k_BSGK: Tensor,
    v_BSHV: Tensor,
    beta_BSH: Tensor,
    g_BTH: Tensor | None = None,
    h0_BHVK: Tensor | None = None,
    starts_BT: Tensor | None = None,
    *,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t per head, in plain torch."""
    with torch.autocast(q_BTGK.device.type, enabled=False):
        if q_BTGK.shape[1] == 1 and h0_BHVK is not None:
            return delta_rule_step(q_BTGK, k_BSGK, v_BSHV, beta_BSH, g_BTH, h0_BHVK, starts_BT, normalize, scale)
        return delta_rule_chunked(q_BTGK, k_BSGK, v_BSHV, beta_BSH, g_BTH, h0_BHVK, starts_BT, normalize, scale)
