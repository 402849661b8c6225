"""One token at a time without gradients (the decoding paths) against the whole sequence at once, for every mixer and cell."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.ssd import reference
from models import mixers
from tests.models.test_contract import CONFIGS, SEGMENTS, D, T, mapping_of, x_of


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
                held = [(v, v.clone()) for v in vars(state).values() if isinstance(v, torch.Tensor)]
                y, state = mixer(x[:, a:b], state, None if segments is None else segments[:, a:b])
                assert all(torch.equal(now, then) for now, then in held)  # an earlier state is never written into
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
