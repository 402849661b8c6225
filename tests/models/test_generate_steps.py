"""One token at a time without gradients (the decoding paths) against the whole sequence at once, for every mixer and cell."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.ssd import reference
from models import mixers
from models.decode import Decoder, cast
from models.session import Session, left_pad
from tests.models.test_contract import CONFIGS, SEGMENTS, D, T, mapping_of, x_of
from tests.models.test_generate import HYBRID, MIXERS, prompts, small


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one-document", "packed"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_decoding_equals_the_sequence_at_once(name: str, segments: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    mixer: Any = mixers.build(mapping_of(name), D, 0)
    mixer.init_weights(0.2, 0)
    x = x_of()
    whole = mixer(x, segment_ids=segments)[0].detach()
    with torch.no_grad():
        for first in (0, 7):  # from the empty state, and after reading seven tokens at once
            state, parts = mixer.init_state(2), []
            for a, b in [(0, first)] * bool(first) + [(t, t + 1) for t in range(first, T)]:
                before = [(v, v.clone()) for v in vars(state).values() if isinstance(v, torch.Tensor)]
                y, state = mixer(x[:, a:b], state, None if segments is None else segments[:, a:b])
                assert all(torch.equal(now, then) for now, then in before)  # an earlier state is never written into
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("start", [False, True])
def test_ssd_step_equals_the_definition(start: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, dt, A, h0 = draw(3, 1, 6, 5), draw(3, 1, 6).exp(), -draw(6).exp(), draw(3, 6, 5, 7)
    B_, C_ = draw(3, 1, 2, 7), draw(3, 1, 2, 7)
    starts = torch.tensor([[True], [False], [True]]) if start else None
    for ours, exact in zip(reference.ssd_step(x, dt, A, B_, C_, h0, starts), reference.ssd_sequential(x, dt, A, B_, C_, h0, starts)):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", sorted(MIXERS))
def test_the_fixed_step_gives_what_growing_states_give(name: str, padded: bool) -> None:
    model = small([name, name])
    ids, lengths = left_pad(prompts(9, 4) if padded else prompts(9, 9), 0)
    session = Session(model, ids, lengths).read()
    decoder = Decoder(model, session.state, 20)
    expected, given = [session._feed(9)], [decoder.step(ids[:, -1]).clone()]
    for token in torch.tensor(prompts(10, 10)).unbind(1):
        with torch.no_grad():
            expected.append(session._step(token[:, None]))
        given.append(decoder.step(token).clone())
    torch.testing.assert_close(torch.stack(given), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_a_full_cache_is_refused_and_a_recurrence_never_fills() -> None:
    ids = torch.tensor(prompts(6))
    for pattern, grows in ((HYBRID, True), (["paragru", "mamba2"], False)):
        model = small(pattern)
        state = Session(model, ids).read().state
        decoder = Decoder(model, state, 7)
        for _ in range(2):
            decoder.step(ids[:, 0])
        if grows:
            with pytest.raises(ValueError, match="full"):
                decoder.step(ids[:, 0])
            with pytest.raises(ValueError, match="leaves no room"):
                Decoder(model, state, 5)
        else:
            decoder.step(ids[:, 0])


def test_bf16_weights_keep_the_recurrences_parameters_and_decode() -> None:
    model = cast(small(HYBRID), torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16 and model.blocks[0].mixer.recurrent.dtype == torch.float32
    session = Session(model, torch.tensor(prompts(6))).read()
    fp32 = small(HYBRID)(session.ids_BT).logits[:, -1]
    low = Decoder(model, session.state, 9).step(session.ids_BT[:, -1]).float()
    assert (low - fp32).norm() / fp32.norm() < 0.1
