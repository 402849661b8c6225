"""M2RNN in plain torch: against autograd of the float64 loop, in pieces, in documents, and as one token."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.m2rnn import launch, m2rnn
from kernels.parallel_rnn.launch import Layout
from models.mixers.m2rnn import Config, Mixer
from tests.kernels.m2rnn_cases import LABELS, answers, asked, distance, oracle, problem


@pytest.mark.parametrize("sizes", [(2, 70, 4, 12, 2, 20), (1, 1, 1, 16, 1, 3), (1, 65, 1, 5, 1, 70)], ids=str)
@pytest.mark.parametrize("starts", [0.0, 0.1])
def test_the_loop_that_keeps_borders_is_the_loop(sizes: tuple[int, ...], starts: float) -> None:
    tensors, new = problem(*sizes, starts=starts)
    tensors = [t.double() for t in tensors]
    do, d_final = asked(tensors)
    for label, a, b in zip(LABELS, answers(m2rnn, tensors, new, do, d_final), oracle(tensors, new, do, d_final)):
        assert distance(a, b) < 1e-12, label


def test_a_step_is_the_published_one() -> None:
    (q, k, v, g, w, h0), _ = problem(1, 1, 1, 3, 1, 2)
    o, final = m2rnn(q.double(), k.double(), v.double(), g.double(), w.double(), h0.double())
    f, S = g.double().exp().item(), h0[0, 0].double()
    wanted = f * S + (1 - f) * torch.tanh(S @ w[0].double() + torch.outer(k[0, 0, 0], v[0, 0, 0]).double())
    torch.testing.assert_close(final[0, 0], wanted)
    torch.testing.assert_close(o[0, 0, 0], wanted.T @ q[0, 0, 0].double())


def test_pieces_and_tokens_are_the_whole() -> None:
    tensors, starts = problem(2, 30, 2, 6, 1, 4, starts=0.1)
    assert starts is not None
    *inputs, w, h0 = tensors
    whole, final = m2rnn(*(*tensors, starts))
    made, h = [], h0
    for a, e in ((0, 11), (11, 12), (12, 13), (13, 30)):
        o, h = m2rnn(*(*(x[:, a:e] for x in inputs), w, h, starts[:, a:e]))
        made.append(o)
    torch.testing.assert_close(torch.cat(made, 1), whole)
    torch.testing.assert_close(h, final)


def test_a_document_that_is_not_finite_stays_alone() -> None:
    tensors, _ = problem(1, 20, 2, 6, 1, 4)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[:, [8, 16]] = True
    do, d_final = asked(tensors)
    wanted = answers(m2rnn, tensors, starts, do, d_final)
    tensors[2][0, 12] = torch.nan
    found = answers(m2rnn, tensors, starts, do, d_final)
    for i in (0, 2, 3, 4, 5):
        assert torch.equal(found[i][:, :8], wanted[i][:, :8]) and torch.equal(found[i][:, 16:], wanted[i][:, 16:]), LABELS[i]
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[7], wanted[7])


@pytest.mark.parametrize(
    "sizes", [(2, 0, 2, 4, 1, 3), (0, 5, 2, 4, 1, 3), (2, 5, 2, 4, 1, 0), (2, 5, 2, 0, 1, 3), (2, 5, 0, 4, 1, 3)], ids=str
)
def test_no_steps_rows_or_numbers(sizes: tuple[int, ...]) -> None:
    """Of keys of no width nothing comes out, whatever the values are, and of weights that are infinite nothing where there is no step."""
    B, T, H, V, G, K = sizes
    shapes = [(B, T, G, K), (B, T, G, K), (B, T, H, V), (B, T, H), (H, V, V), (B, H, K, V)]
    given = [torch.ones(shape).requires_grad_() for shape in shapes]
    w = torch.full((H, V, V), torch.inf).requires_grad_() if T == 0 else given[4]
    o, final = m2rnn(given[0], given[1], given[2], -given[3], w, given[5])
    assert o.shape == (B, T, H, V) and final.shape == (B, H, K, V) and not o.any() and torch.equal(final, given[5])
    (o.sum() + final.sum()).backward()
    assert all(t.grad is not None and not t.grad.any() for t in (*given[:4], w))


def test_no_steps_and_what_does_not_fit() -> None:
    (q, k, v, g, w, h0), starts = problem(1, 4, 2, 6, 1, 4, starts=0.5)
    assert starts is not None
    empty = [x[:, :0].requires_grad_() for x in (q, k, v, g)]
    o, final = m2rnn(*(*empty, w, h0))
    assert o.shape == (1, 0, 2, 6) and torch.equal(final, h0)
    for bad in (
        (q, k[:, :3], v, g, w),
        (q, k, v, g[..., :1], w),
        (q, k, v, g, w[:1]),
        (q, k, v, g, w, h0.mT),
        (q, k, v, g, w, h0, starts.int()),
        (q[0], k[0], v, g, w),
    ):
        with pytest.raises(ValueError, match="must be"):
            m2rnn(*bad)
    with pytest.raises(ValueError, match="floating-point numbers, not torch.int64"):
        m2rnn(*(t.long() for t in (q, k, v, g, w)))


def test_compiled_under_autocast_and_made_again() -> None:
    tensors, starts = problem(1, 20, 2, 6, 1, 4, starts=0.1)
    do, d_final = asked(tensors)
    wanted = answers(m2rnn, tensors, starts, do, d_final)
    compiled = answers(torch.compile(m2rnn, fullgraph=True, backend="aot_eager"), tensors, starts, do, d_final)
    with torch.autocast("cpu", torch.bfloat16):
        cast = answers(m2rnn, tensors, starts, do, d_final)
    again = answers(lambda *given: checkpoint(m2rnn, *given, use_reentrant=False), tensors, starts, do, d_final)
    assert all(torch.equal(a, b) for found in (compiled, cast, again) for a, b in zip(found, wanted))


def test_a_tracker_begins_with_a_convolution_of_one_token() -> None:
    """And with gates that forget; what is no start is refused in a sentence."""
    for start, looks_back in (("published", True), ("tracker", False)):
        config = Config(n_heads=2, head_dim=1, expand_v=8.0, start=start)
        mixer = Mixer(config, 16, 0)
        torch.manual_seed(0)
        mixer.init_weights(0.1, 1)
        x = torch.randn(1, 4, 16)
        other = x.clone()
        other[:, 1] += 1.0
        seen, changed = (mixer.conv(mixer.in_proj(t), mixer.values, None, None)[1] for t in (x, other))
        assert (not torch.equal(seen[:, 2:], changed[:, 2:])) == looks_back
        keep = torch.exp(mixer._gates(torch.zeros(1, 1, 2)))
        assert looks_back or torch.allclose(keep, torch.full_like(keep, 0.05))
        assert mixer(x)[0].isfinite().all() and not config.problems(16)
    assert "published or tracker" in Config(start="identity").problems(64)[0]


def test_what_32_bits_do_not_count_is_brought_together() -> None:
    """Heads, and projections of cells, each before all steps of the next."""
    for heads, apart in ((31, True), (32, False)):
        x = torch.empty(heads, 1, 1 << 20, 64, device="meta").permute(1, 2, 0, 3)
        assert (launch.neighbours(x) is x) == apart
        assert (Layout(x[..., None, :]).tensor.stride(2) == 1 << 26) == apart


@pytest.mark.parametrize("B, H, K, rows", [(4, 16, 64, 16), (4, 16, 128, 32), (16, 12, 64, 64), (1, 12, 64, 16)])
def test_programs_beyond_what_a_gpu_holds_have_more_rows(monkeypatch: pytest.MonkeyPatch, B: int, H: int, K: int, rows: int) -> None:
    """Of an H200's 132 multiprocessors: 256, 512, 768 and 48 programs of 16 rows."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    problem = launch.Problem.__new__(launch.Problem)
    problem.v, problem.B, problem.H, problem.K = torch.zeros(0), B, H, K
    assert [problem.soonest(tiles)[0] for tiles in launch.WALKS[64].values()] == [rows, rows]
