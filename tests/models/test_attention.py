"""Attention over packed documents without masks: where they lie, and what is handed to torch's kernel, which needs a GPU and is replaced by a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from kernels import attention
from models import attend
from models.attend import packed_attention
from models.config import ModelConfig
from models.lm import LanguageModel
from models.mixers.attention import Config, Mixer
from models.sampling import Sampling
from models.segments import Documents
from models.session import Session, left_pad


def test_documents_are_looked_up_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = Documents(torch.tensor([[0, 0, 1, 1, 2], [2, 2, 2, 2, 2]], dtype=torch.int32))  # a row is a document of its own
    assert documents.borders().tolist() == [0, 2, 4, 5, 10] and documents.cuts() == [[0, 2, 4, 5], [0, 5]]
    with torch.inference_mode():
        assert Documents(torch.tensor([[0, 1]])).borders().tolist() == [0, 1, 2]
    monkeypatch.setattr(attend, "MASK_ELEMENTS", 0)  # documents one by one, which must know where they are
    look_up, looked = torch.Tensor.nonzero, []

    def noted(tensor: Tensor) -> Tensor:
        looked.append(0)
        return look_up(tensor)

    monkeypatch.setattr(torch.Tensor, "nonzero", noted)
    mixers = {"a": {"type": "attention", "n_heads": 2}}
    model = LanguageModel(ModelConfig(vocab_size=16, d_model=16, n_layers=3, pattern=["a"], mixers=mixers))
    model.init_weights(0)
    looked.clear()
    segments = torch.tensor([[0, 0, 1, 1, 2], [2, 2, 2, 2, 2]])
    first = model(segments, segment_ids=segments).logits
    segments[0, 0] = 7  # another batch, in the memory of the one before
    assert len(looked) == 1 and not torch.equal(model(torch.zeros_like(segments), segment_ids=segments).logits, first) and len(looked) == 2


def loop(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, _: Tensor, longest: int, *__: object, window_size: tuple[int, int]) -> Tensor:
    """varlen_attn by its documentation, a document at a time."""
    out = torch.empty_like(q)
    for a, e in zip(begins.tolist(), begins.tolist()[1:]):
        assert e - a <= longest
        ahead = torch.arange(e - a)[:, None] - torch.arange(e - a)
        mask = (ahead >= -window_size[1]) & ((ahead <= window_size[0]) | (window_size[0] < 0))
        q_, k_, v_ = (t[a:e].transpose(0, 1) for t in (q, k, v))
        out[a:e] = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask).transpose(0, 1)
    return out


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("settings", [{}, {"n_kv_heads": 2}, {"window": 3}, {"window": 7, "n_kv_heads": 1}], ids=str)
def test_packed_attention_is_attention_under_the_mask(settings: dict[str, Any], packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", loop)
    mixer = Mixer(Config(n_heads=4, **settings), 32, 0)
    mixer.init_weights(0.3, 0)
    x = torch.randn(3, 23, 32)
    segments = (torch.rand(3, 23) < 0.2).cumsum(1).int() if packed else None
    wanted = mixer(x, None, segments)[0]
    if packed or "window" in settings:
        monkeypatch.setattr(attend, "packable", lambda q: True)
        calls = []

        def noted(*a: Any) -> Tensor:
            calls.append(0)
            return packed_attention(*a)

        monkeypatch.setattr(attend, "packed_attention", noted)
        torch.testing.assert_close(mixer(x, None, segments)[0], wanted)
        assert calls
    if packed and "window" not in settings:
        monkeypatch.setattr(attend, "LONG", 0)  # each document alone
        torch.testing.assert_close(mixer(x, None, segments)[0], wanted)
        assert len(calls) == 1


def test_own_kernels_take_what_is_divided_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents and windows of rows, and of the last tokens of rows; where torch is asked for, and of a single token, not."""
    q, k, v = (torch.randn(2, n, 12, 8, dtype=torch.float64) for n in (4, 2, 2))
    documents, calls = Documents((torch.rand(2, 12) < 0.3).cumsum(1)), []
    run = attention.attention

    def noted(*a: Any) -> Tensor:
        calls.append(0)
        return run(*a)

    monkeypatch.setattr(attention, "attention", noted)
    for queries in (q, q[:, :, -5:], q[:, :, -1:]):
        for given, window in ((documents, 0), (documents, 4), (None, 4), (None, 0)):
            wanted = attend.attend(queries, k, v, given, window)
            assert not calls, "not in float64 on a CPU"
            with monkeypatch.context() as patch:
                patch.setattr(attention, "why_not", lambda q: "")
                torch.testing.assert_close(attend.attend(queries, k, v, given, window), wanted)
                assert not calls, "not of heads that were never seen on a GPU"
                patch.setattr(attend, "own_kernels", "own")
                torch.testing.assert_close(attend.attend(queries, k, v, given, window), wanted)
                assert bool(calls) == (queries.shape[2] > 1 and (given is not None or window > 0))
                calls.clear()
                patch.setattr(attend, "own_kernels", "torch")
                torch.testing.assert_close(attend.attend(queries, k, v, given, window), wanted)
                assert not calls


@pytest.mark.parametrize("over", ["head", "heads"])
def test_norms_of_queries_and_keys_read_them_as_they_lie(over: str) -> None:
    """What they cannot see as rows they copy, forward and twice backward."""
    rows = pytest.importorskip("kernels.gated_norm.launch").rows
    mixer = Mixer(Config(n_heads=4, n_kv_heads=2, qk_norm=True, qk_norm_over=over), 32, 0)
    given: list[torch.Tensor] = []
    for norm in (mixer.q_norm, mixer.k_norm):
        assert norm is not None
        norm.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    mixer.init_weights(0.02, 1)
    mixer(torch.randn(2, 9, 32))
    assert len(given) == 2 and all(rows(x).data_ptr() == x.data_ptr() for x in given)


@torch.no_grad()
@pytest.mark.parametrize("fixed", [False, True])
def test_dynamic_positions_stretch_by_the_document(fixed: bool) -> None:
    """Beyond the original length of 8: packed documents, and rows of other lengths beside each other, are what each of them is alone."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8}
    mixers = {"a": {"type": "attention", "n_heads": 2, "rope_scaling": scaling}}
    model = LanguageModel(ModelConfig(vocab_size=16, d_model=32, n_layers=2, pattern=["a"], mixers=mixers))
    model.init_weights(0)
    for parameter in model.parameters():
        parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
    ids = torch.randint(16, (1, 40), generator=torch.Generator().manual_seed(0))
    packed = model(ids, segment_ids=torch.tensor([[0] * 5 + [1] * 21 + [2] * 14])).logits
    for first, end in ((0, 5), (5, 26), (26, 40)):
        torch.testing.assert_close(packed[:, first:end], model(ids[:, first:end]).logits, atol=2e-5, rtol=1e-4)

    prompts = [ids[0, :11].tolist(), ids[0, 11:14].tolist(), ids[0, 14:30].tolist()]
    padded, lengths = left_pad(prompts, 0)
    greedy, together = Sampling(temperature=0), Session(model, padded, lengths)
    texts = together.generate(9, greedy, graph=fixed)
    logits = together._feed(together.ids_BT.shape[1])  # behind the last token, from the cache
    for row, prompt in enumerate(prompts):
        alone = Session(model, torch.tensor([prompt]))
        assert texts[row].tolist() == alone.generate(9, greedy, graph=False)[0].tolist()
        torch.testing.assert_close(logits[row : row + 1], alone._feed(alone.ids_BT.shape[1]), atol=2e-5, rtol=1e-4)
    windowed = Mixer(Config(n_heads=2, window=4, rope_scaling=scaling), 32, 0)
    windowed.init_weights(0.1, 0)
    x, rows = torch.randn(2, 12, 32), torch.tensor([[0] * 3 + [1] * 9, [0] * 12])
    with pytest.raises(ValueError, match="read one document a row"):
        windowed(x, windowed(x, windowed.init_state(2), rows)[1])
