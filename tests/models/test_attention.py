"""Attention over packed documents without masks: where they lie, and what is handed to torch's kernel, which needs a GPU and is replaced by a loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from models.mixers import attention
from models.mixers.attention import Config, Mixer, documents_of, packed_attention


def test_documents_are_found_once_and_again_when_the_segments_change() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2], [2, 2, 2, 2, 2]], dtype=torch.int32)  # a row is a document of its own
    bounds, cuts = documents_of(segments)
    assert bounds.tolist() == [0, 2, 4, 5, 10] and cuts == [[0, 2, 4, 5], [0, 5]]
    assert documents_of(segments)[0] is bounds
    segments[1, 2:] = 4
    assert documents_of(segments)[1] == [[0, 2, 4, 5], [0, 2, 5]]
    with torch.inference_mode():
        assert documents_of(torch.tensor([[0, 1]]))[0].tolist() == [0, 1, 2]


def loop(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, _: Tensor, longest: int, *__: object, window_size: tuple[int, int]) -> Tensor:
    """varlen_attn by its documentation, a document at a time."""
    out = torch.empty_like(q)
    for a, e in zip(begins.tolist(), begins.tolist()[1:]):
        assert e - a <= longest
        ahead = torch.arange(e - a)[:, None] - torch.arange(e - a)
        mask = (ahead >= -window_size[1]) & ((ahead <= window_size[0]) | (window_size[0] < 0))
        parts = (t[a:e].transpose(0, 1) for t in (q, k, v))
        out[a:e] = F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(0, 1)
    return out


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("settings", [{}, {"n_kv_heads": 2}, {"window": 3}, {"window": 7, "n_kv_heads": 1}], ids=str)
def test_packed_attention_is_attention_under_the_mask(settings: dict[str, int], packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", loop)
    mixer = Mixer(Config(n_heads=4, **settings), 32, 0)
    mixer.init_weights(0.3, 0)
    x = torch.randn(3, 23, 32)
    segments = (torch.rand(3, 23) < 0.2).cumsum(1).int() if packed else None
    wanted = mixer(x, None, segments)[0]
    if packed or "window" in settings:
        monkeypatch.setattr(Mixer, "_packable", staticmethod(lambda q: True))
        calls = []
        monkeypatch.setattr(attention, "packed_attention", lambda *a: calls.append(0) or packed_attention(*a))
        torch.testing.assert_close(mixer(x, None, segments)[0], wanted)
        assert calls
    if packed and "window" not in settings:
        monkeypatch.setattr(attention, "LONG", 0)  # each document alone
        torch.testing.assert_close(mixer(x, None, segments)[0], wanted)
        assert len(calls) == 1
