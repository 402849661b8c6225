"""Aaren against torch's softmax attention with one query for all tokens, and what follows from it: the more it has read, the less a token counts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from models import mixers
from scripts.studies.methods.aaren import latest_share


def built(**values: Any) -> Any:
    torch.manual_seed(0)
    mixer = mixers.build({"type": "aaren", "n_heads": 2, "d_conv": 0, **values}, 8, 0)
    mixer.init_weights(0.7, 0)
    return mixer.double().eval()


def test_it_is_softmax_attention_with_a_fixed_query() -> None:
    mixer, T = built(), 150  # three chunks
    x = torch.randn(2, T, 8, dtype=torch.float64)
    k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in F.linear(x, mixer.in_proj.weight).chunk(2, -1))
    q = mixer.query[None, :, None].expand(2, 2, T, 4)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x)[0], F.linear(wanted, mixer.out_proj.weight))


def test_scores_of_any_size_do_not_overflow() -> None:
    mixer = built().float()
    x = 1e4 * torch.randn(1, 80, 8)
    y, state = mixer(x, mixer.init_state(1))
    assert y.isfinite().all() and all(t.isfinite().all() for t in (state.log_sum_BH, state.average_BHK))


def test_it_cannot_forget_and_a_gated_recurrence_can() -> None:
    """The share of the newest token in the state falls with all that was read before; that of minGRU does not."""
    near, far = (latest_share({"type": "aaren", "n_heads": 2}, read) for read in (16, 1024))
    assert far < near / 20
    near, far = (latest_share({"type": "rnn", "cell": "mingru", "n_heads": 2}, read) for read in (16, 1024))
    assert far > near / 3
