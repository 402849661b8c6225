"""States, retention and cures against float64 loops over single steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evals.adapters.base import Adapter, ItemError, LayerState, total_variation
from evals.adapters.own import OwnAdapter
from evals.cures import options as cures
from evals.cures.attention import lambda_mask
from evals.cures.hooks import Scan, measure_retention, scan_hook
from evals.cures.scan import dt_scaling, horizon_multiplier, longmamba, retention, skip_limit, window
from evals.cures.setting import Setting
from evals.cures.state import clamp, restart
from evals.measures.position import position_curve
from evals.measures.states import effective_remembrance, head_statistics, state_curve
from models.mixers import attention as attention_module
from models.mixers import mamba2 as mamba2_module
from tests.evals.conftest import VOCABULARY, own_adapter
from training.errors import UserError


def ids(rows: int, T: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCABULARY, (rows, T))


def random_scan(T: int = 23, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    B, H, P, G, N = 2, 4, 3, 2, 5
    shapes = {"x": (B, T, H, P), "dt": (B, T, H), "A": (H,), "B": (B, T, G, N), "C": (B, T, G, N), "h": (B, H, P, N)}
    r = {k: torch.randn(v, generator=g, dtype=torch.float64) for k, v in shapes.items()}
    return r["x"], r["dt"].exp() * 0.1, -r["A"].exp(), r["B"], r["C"], r["h"]


def loop(x: Any, dt: Any, A: Any, B: Any, C: Any, h: Any, *, m: float = 1.0, b: float = 1.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """h_t = m alpha_t h + b dt x B^T, one step at a time; outputs and all states."""
    out, states = [], []
    for t in range(x.shape[1]):
        k, q = B[:, t].repeat_interleave(2, 1), C[:, t].repeat_interleave(2, 1)
        h = m * torch.exp(dt[:, t] * A)[..., None, None] * h + b * (dt[:, t, :, None] * x[:, t])[..., None] * k[:, :, None]
        out.append((h * q[:, :, None]).sum(-1))
        states.append(h)
    return torch.stack(out, 1), states


def setting(T: int = 16, total: int = 64) -> Setting:
    return Setting(T, total, ids(3, T, 9), 8)


def in_chunks(scan: tuple[torch.Tensor, ...], cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixer's scan function, as it is at the moment, fed in chunks."""
    x, dt, A, B, C, h = scan
    parts = []
    for a, e in zip(cuts, cuts[1:]):
        y, h = mamba2_module.ssd(x[:, a:e], dt[:, a:e], A, B[:, a:e], C[:, a:e], h, None, chunk=4)
        parts.append(y)
    return torch.cat(parts, 1), h


def test_retention_and_insertion_scaling() -> None:
    adapter, scan = own_adapter("m", n_layers=1), random_scan()
    for m, b in ((0.97, 0.75), (1.0, 0.5), (0.9, 1.0)):
        with retention(adapter, setting(), m=m, b=b):
            y, h = in_chunks(scan, [0, 9, 23])
        expected, states = loop(*scan, m=m, b=b)
        torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(h, states[-1], atol=1e-10, rtol=1e-10)
    assert horizon_multiplier(8192) == pytest.approx(0.9999) and horizon_multiplier(512) == pytest.approx(0.9984, abs=1e-4)


def test_dt_scaling() -> None:
    adapter, (x, dt, A, B, C, h0) = own_adapter("m", n_layers=1), random_scan()
    with dt_scaling(adapter, setting(), c=0.3):
        y, h = in_chunks((x, dt, A, B, C, h0), [0, 5, 23])
    expected, states = loop(x, 0.3 * dt, A, B, C, h0)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h, states[-1])


@pytest.mark.parametrize("r", [1, 2, 5, 11, 100])
def test_window_is_the_difference_of_states(r: int) -> None:
    adapter, (x, dt, A, B, C, h0) = own_adapter("m", n_layers=1), random_scan()
    with window(adapter, setting(), r=r):
        y, h = in_chunks((x, dt, A, B, C, torch.zeros_like(h0)), [0, 3, 10, 12, 23])
    _, states = loop(x, dt, A, B, C, torch.zeros_like(h0))
    for t in range(23):
        difference = states[t]
        if t >= r:
            alpha = torch.exp(dt[:, t - r + 1 : t + 1].sum(1) * A)[..., None, None]
            difference = states[t] - alpha * states[t - r]
        expected = (difference * C[:, t].repeat_interleave(2, 1)[:, :, None]).sum(-1)
        torch.testing.assert_close(y[:, t], expected, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(h, difference, atol=1e-9, rtol=1e-7)


def test_window_over_the_whole_text_changes_nothing_and_forgets_between_texts() -> None:
    adapter, rows = own_adapter("mg", n_layers=2), ids(2, 65)
    plain = position_curve(adapter, rows, chunk=16)["nats_per_token"]
    with window(adapter, setting(), r=64):
        assert position_curve(adapter, rows, chunk=16)["nats_per_token"] == pytest.approx(plain, rel=1e-5)
        assert position_curve(adapter, rows, chunk=7)["nats_per_token"] == pytest.approx(plain, rel=1e-5)
    assert adapter.on_start is None


def test_longmamba_skips_as_much_as_it_says() -> None:
    dt = torch.rand(1000, 3, dtype=torch.float64)
    g = skip_limit(dt, 0.25)
    for head in range(3):
        share = dt[:, head][dt[:, head] >= g[head]].sum() / dt[:, head].sum()
        assert 0.25 <= share < 0.256
    assert skip_limit(dt, 1.0).tolist() == [0, 0, 0]
    adapter, rows, seen = own_adapter("m", n_layers=2), ids(2, 65), []

    def look(module: Any, inputs: Any, output: Any) -> None:
        seen.append(1)

    with torch.no_grad():
        for block in adapter.model.blocks:
            block.mixer.A_log.fill_(-3.0)
    plain = position_curve(adapter, rows, chunk=16)["nats_per_token"]
    with longmamba(adapter, setting(16, 16)):
        assert position_curve(adapter, rows, chunk=16)["nats_per_token"] == pytest.approx(plain, rel=1e-6)
    with longmamba(adapter, setting(16, 64)), measure_retention(adapter) as cured:
        assert position_curve(adapter, rows, chunk=16)["nats_per_token"] != pytest.approx(plain, rel=1e-6)
    with measure_retention(adapter) as before:
        position_curve(adapter, rows, chunk=16)
    assert set(cured.totals) == set(before.totals)


def test_clamp_and_restart_bound_the_state() -> None:
    adapter, rows = own_adapter("mg", n_layers=2), torch.from_numpy(ids(2, 64))
    limit = 0.5
    with clamp(adapter, setting(), p=limit):
        state = adapter.start(2)
        for a in range(0, 64, 8):
            state = adapter.advance(rows[:, a : a + 8], state)
            for s in adapter.layer_states(state):
                heads = s.entries.norm(dim=-1) if s.name == "ssm" else s.entries.norm(dim=-1)
                assert float(heads.max()) <= limit * (1 + 1e-5)
    free = adapter.advance(rows, adapter.start(2))
    with clamp(adapter, setting(), p=1e9):
        for loose, plain in zip(adapter.layer_states(adapter.advance(rows, adapter.start(2))), adapter.layer_states(free)):
            assert torch.equal(loose.entries, plain.entries)
    with clamp(adapter, setting(), q=1.0):  # limits from calibration text
        adapter.advance(rows, adapter.start(2))
    with restart(adapter, setting(16)):
        state = adapter.advance(rows[:, :8], adapter.start(2))
        assert all(float(s.entries.abs().max()) > 0 for s in adapter.layer_states(state))
        state = adapter.advance(rows[:, 8:16], state)
        assert all(float(s.entries.abs().max()) == 0 for s in adapter.layer_states(state))


def brute_lambda(q: Any, k: Any, v: Any, first: int, local: int) -> torch.Tensor:
    """One query and key at a time: rotary scores depend on the distance alone, capped at `local`. q, k, v (B, H, T, K) not rotated."""
    from kernels.rotary.reference import rotate

    B, H, T, K = q.shape
    out = torch.zeros_like(v)
    for i in range(T):
        seen = [j for j in range(i + 1) if i - j < local or j < first]
        turned = torch.stack(
            [(rotate(q[:, :, i : i + 1], torch.tensor([min(i - j, local)]), 10000.0)[:, :, 0] * k[:, :, j]).sum(-1) for j in seen], -1
        )
        out[:, :, i] = torch.einsum("bhs,bhsk->bhk", (turned / K**0.5).softmax(-1), v[:, :, seen])
    return out


def test_lambda_mask_against_brute_force_and_in_chunks() -> None:
    adapter = own_adapter("a", n_layers=1)
    adapter.model.double()
    mixer: Any = adapter.model.blocks[0].mixer
    x = torch.randn(2, 41, 32, dtype=torch.float64)
    split = lambda p: p(x).view(2, 41, 2, 16).transpose(1, 2)  # noqa: E731
    expected = brute_lambda(split(mixer.q_proj), split(mixer.k_proj), split(mixer.v_proj), 3, 7)
    expected = mixer.o_proj(expected.transpose(1, 2).reshape(2, 41, 32))
    plain, _ = mixer(x)
    with lambda_mask(adapter, setting(), first=3, local=7):
        torch.testing.assert_close(mixer(x)[0], expected, atol=1e-9, rtol=1e-9)
        state, parts = mixer.init_state(2), []
        for a, b in ((0, 2), (2, 13), (13, 14), (14, 41)):
            y, state = mixer(x[:, a:b], state)
            parts.append(y)
            assert state.k_BGLK.shape[2] <= 10
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-9, rtol=1e-9)
    with lambda_mask(adapter, setting(), first=3, local=41):
        torch.testing.assert_close(mixer(x)[0], plain, atol=1e-9, rtol=1e-9)
    assert mixer.forward.__func__ is attention_module.Mixer.forward


def test_hooks_change_nothing_by_themselves(adapters: dict[str, Adapter]) -> None:
    rows = ids(3, 50)
    for name in ("mamba2", "own"):
        adapter = adapters[name]
        plain, prompt = position_curve(adapter, rows, chunk=13)["nats_per_token"], torch.from_numpy(rows)
        written = adapter.greedy(prompt, 6, 16)
        with retention(adapter, setting(), m=1.0, b=1.0):
            assert position_curve(adapter, rows, chunk=13)["nats_per_token"] == pytest.approx(plain, rel=1e-5)
            assert torch.equal(adapter.greedy(prompt, 6, 16), written)  # single tokens as well
        with retention(adapter, setting(), m=0.8, b=0.5):
            assert position_curve(adapter, rows, chunk=13)["nats_per_token"] != pytest.approx(plain, rel=1e-5)
        with clamp(adapter, setting(), q=0.5):
            position_curve(adapter, rows, chunk=13)
        assert position_curve(adapter, rows, chunk=13)["nats_per_token"] == pytest.approx(plain, rel=1e-6)
    with pytest.raises(ItemError, match="no Mamba-2 scan"), scan_hook(adapters["llama"], lambda layer, s, run: run(s)):
        pass


def test_retention_of_scans_and_cells(adapters: dict[str, Adapter]) -> None:
    adapter = own_adapter("ml", n_layers=2)
    model: Any = adapter.model
    x = torch.from_numpy(ids(2, 30))
    with measure_retention(adapter) as measured:
        state = adapter.start(2)
        for a, b in ((0, 11), (11, 30)):
            state = adapter.advance(x[:, a:b], state)
    assert measured.tokens == {(0, "ssm"): 30, (1, "c"): 30, (1, "h"): 30}
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        raw = mixer.in_proj(model.blocks[0].mixer_norm(model.embedding(x)))[..., -mixer.H :]
        expected = (F.softplus(raw + mixer.dt_bias) * -mixer.A_log.exp()).sum(1).double()
    torch.testing.assert_close(measured.totals[(0, "ssm")], expected, atol=1e-4, rtol=1e-4)
    # The cell: by finite differences of its step, along the states it went through.
    layer = model.blocks[1].mixer
    taken: dict[str, Any] = {}
    import models.mixers.rnn as rnn

    original = rnn.parallel_rnn

    def note(cell: Any, pre: Any, rec: Any, h0: Any, starts: Any, *, bias_PD: Any, **options: Any) -> Any:
        taken.update(pre=pre.flatten(3).double() + bias_PD.double(), rec=rec.double())
        return original(cell, pre, rec, h0, starts, bias_PD=bias_PD, **options)

    rnn.parallel_rnn = note  # type: ignore[assignment]
    try:
        with torch.no_grad():
            model(x)
    finally:
        rnn.parallel_rnn = original
    h, total = torch.zeros(2, 2, 32, dtype=torch.float64), torch.zeros(2, 2, 32, dtype=torch.float64)
    for t in range(30):

        def step(state: torch.Tensor, t: int = t) -> torch.Tensor:
            return torch.stack(layer.cell.step(*taken["pre"][:, t].unbind(1), *taken["rec"].unbind(0), *state.unbind(1)), 1)

        for s in range(2):
            e = torch.zeros_like(h)
            e[:, s] = 1e-6
            total[:, s] += ((step(h + e) - step(h - e))[:, s] / 2e-6).abs().clamp(min=1e-30).log()
        h = step(h)
    for s, name in enumerate(layer.cell.state):
        torch.testing.assert_close(measured.totals[(1, name)], total[:, s], atol=2e-2, rtol=2e-3)
    with measure_retention(adapters["mamba2"]) as foreign:
        adapters["mamba2"].advance(x, adapters["mamba2"].start(2))
    assert set(foreign.totals) == {(0, "ssm"), (1, "ssm")} and all(bool((v < 0).all()) for v in foreign.totals.values())


def test_head_statistics() -> None:
    x = torch.randn(3, 2, 200, dtype=torch.float64)
    statistics = head_statistics(LayerState(0, "h", x, (200,)))
    np.testing.assert_allclose(statistics["variance"], x.numpy().var(-1, ddof=1).mean(0))
    np.testing.assert_allclose(statistics["largest"], np.abs(x.numpy()).max(-1).mean(0))
    energy = np.sort(x.numpy() ** 2, -1)
    np.testing.assert_allclose(statistics["top"], (energy[..., -2:].sum(-1) / energy.sum(-1)).mean(0))
    assert "effective_rank" not in statistics
    matrices = torch.stack([torch.eye(6), torch.outer(torch.arange(1.0, 7), torch.ones(6)), torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0]))])
    ranks = head_statistics(LayerState(0, "ssm", matrices.flatten(1)[None], (6, 6)))["effective_rank"]
    np.testing.assert_allclose(ranks, [6, 1, 3], rtol=1e-4)


def test_state_curve_is_what_the_states_are(adapters: dict[str, Adapter]) -> None:
    rows = ids(2, 300)
    for adapter in (adapters["own"], adapters["mamba2"]):
        curve = state_curve(adapter, rows, 100, chunk=31)
        assert [s["position"] for s in curve["snapshots"]] == [64, 100, 128, 256, 300]
        for snapshot in curve["snapshots"]:
            whole = adapter.layer_states(adapter.advance(torch.from_numpy(rows[:, : snapshot["position"]]), adapter.start(2)))
            for a, b in zip(snapshot["states"], whole):
                np.testing.assert_allclose(a["variance"], head_statistics(b)["variance"], rtol=2e-3)
        assert len(curve["growth"]) == sum(len(s["variance"]) for s in curve["snapshots"][0]["states"])
        row = curve["retention"][0]
        assert row["tokens"] == 300 and row["tokens_T"] == 100 and 0 <= row["kept_half_T"] <= 1
    with pytest.raises(ItemError, match="no recurrent state"):
        state_curve(adapters["llama"], rows, 100)


def test_effective_remembrance_of_a_model_that_sees_four_tokens() -> None:
    adapter: OwnAdapter = own_adapter("a", n_layers=1)
    mixer: Any = adapter.model.blocks[0].mixer
    mixer.config.window = 4
    remembrance = effective_remembrance(adapter, ids(6, 40), [0, 20, 36, 38], chunk=9)
    distances = [c["distance"] for c in remembrance["curve"]]
    assert (
        distances[0] == 0
        and distances[1] == pytest.approx(0, abs=1e-5)
        and distances[2] == pytest.approx(0, abs=1e-5)
        and distances[3] > 0.01
    )
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert float(total_variation(p, q)) == pytest.approx(0.25)


@pytest.mark.parametrize("text, part", [("nothing", "There is no cure"), ("dt:c=x", "NAME:key=number"), ("dt:q=1", "no option 'q'")])
def test_mistakes_in_cures_are_sentences(text: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        cures.parse(text)


def test_cures_are_parsed_and_offered(adapters: dict[str, Adapter]) -> None:
    parsed = cures.parse("retention:m=0.99:b=0.5, restart")
    assert [c.label for c in parsed] == ["retention-m0.99-b0.5", "restart"] and parsed[0].options == {"m": 0.99, "b": 0.5}
    assert {c.name for c in cures.suitable(adapters["own"])} == set(cures.CURES)
    assert {c.name for c in cures.suitable(adapters["mamba2"])} == set(cures.CURES) - {"lambda"}
    assert cures.suitable(adapters["llama"]) == []
    assert Scan.__dataclass_fields__.keys() >= {"x", "dt"}
