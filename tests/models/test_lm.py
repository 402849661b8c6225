"""The language model: loss, checkpointing, generation, configuration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.config import ModelConfig
from models.generate import generate, sample
from models.init import roles
from models.lm import LanguageModel
from training.optim import parameter_groups

MIXERS = {
    "g": {"type": "rnn", "n_heads": 2},
    "m": {"type": "mamba2", "d_state": 8, "head_dim": 16},
    "a": {"type": "attention", "n_heads": 2},
}


def small(**changes: object) -> LanguageModel:
    settings = {"vocab_size": 71, "d_model": 32, "n_layers": 3, "pattern": ["g", "m", "a"], "mixers": MIXERS, **changes}
    model = LanguageModel(ModelConfig.from_dict(settings))
    model.init_weights(0)
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 71, (2, 24), generator=generator)
    labels = ids.roll(-1, 1)
    labels[0, 5:9] = -100
    return ids[:, :23], labels[:, :23]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_loss_in_pieces_equals_cross_entropy_with_gradients(tie: bool, recompute: bool) -> None:
    ids, labels = data()
    model = small(tie_embeddings=tie, head_chunk=7, recompute_head=recompute, z_loss=1e-2)
    output = model(ids, labels=labels, reduction="none")
    (output.loss_sum + output.z_loss_sum).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    z = 1e-2 * (logits.logsumexp(-1).square() * (labels != -100)).sum()
    (expected + z).backward()
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(output.z_loss_sum, z)
    torch.testing.assert_close(output.token_nll, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels))
    assert int(output.token_count) == int((labels != -100).sum())
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-4)


def test_activation_checkpointing_changes_no_gradient() -> None:
    ids, labels = data()
    gradients = []
    for mode in ("none", "full"):
        model = small()
        model.set_activation_checkpointing(mode)
        model(ids, labels=labels).loss_sum.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_generation_with_state_equals_reading_the_prefix_again() -> None:
    model = small().eval()
    prompt = data()[0][:, :6]
    ids = generate(model, prompt, 10, temperature=0)
    expected = prompt
    for _ in range(10):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, expected)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["aaren", "rnn", "mamba2", "attention", "delta"])
def test_no_tokens_change_nothing(mixer: str) -> None:
    extra: dict[str, object] = {"depth": {"type": "universal", "loops": 2}} if mixer == "rnn" else {}
    model = small(pattern=["m"], mixers={"m": {"type": mixer, **({"head_dim": 8} if mixer == "mamba2" else {})}}, **extra).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    none, segments = ids[:, :0], torch.zeros(2, 0, dtype=torch.int32)
    assert model(none).logits.shape == model(none, segment_ids=segments).logits.shape == (2, 0, model.config.vocab_size)
    assert model(none, labels=none).loss_sum == 0
    before = model(ids[:, :3], state=model.init_state(2)).state
    after = model(none, state=before, segment_ids=segments).state
    torch.testing.assert_close(model(ids[:, 3:], state=after).logits, model(ids[:, 3:], state=before).logits, rtol=0, atol=0)


def test_sampling_keeps_to_top_k_and_top_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(2000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, 1.0, 2, None, generator).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, None, 0.79, generator).tolist()) == {0, 1}
    assert set(sample(logits, 1.0, None, 0.81, generator).tolist()) == {0, 1, 2}
    drawn = sample(logits, 1.0, None, None, generator).bincount(minlength=4) / 2000
    assert (drawn - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.05


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(small(), torch.zeros(1, 0, dtype=torch.long), 3)


def test_decay_goes_to_matrices_only_and_every_parameter_is_in_one_group() -> None:
    model = small()
    groups = parameter_groups(model, 0.1)
    decayed = {n for g in groups if g["weight_decay"] for n in g["names"]}
    assert sorted(n for g in groups for n in g["names"]) == sorted(n for n, _ in model.named_parameters())
    assert "blocks.0.mixer.in_proj.weight" in decayed and "head.weight" in decayed
    for name in ("blocks.0.mixer.recurrent", "blocks.1.mixer.A_log", "norm.weight", "embedding.weight", "blocks.1.mixer.dt_bias"):
        assert name not in decayed
    assert {n for n, p in model.named_parameters() if "keep_fp32" in roles(p)} == {
        "blocks.0.mixer.recurrent",
        "blocks.1.mixer.A_log",
        "blocks.1.mixer.D",
        "blocks.1.mixer.dt_bias",
    }


def test_counts_and_meta_device() -> None:
    model = small()
    assert sum(model.parameter_counts().values()) == sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        assert sum(p.numel() for p in LanguageModel(model.config).parameters()) == sum(p.numel() for p in model.parameters())


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    a, b = small(), small()
    before = torch.get_rng_state()
    b.init_weights(0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_config_reports_all_problems_together() -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_dict(
            {
                "vocab_size": 10,
                "d_model": 30,
                "pattern": ["a", "nope"],
                "n_layers": 0,
                "mixers": {
                    "a": {"type": "attention", "n_heads": 4, "n_haeds": 3},
                    "r": {"type": "rnn", "cell": "grru"},
                    "x": {"type": "attn"},
                },
            }
        )
    text = str(caught.value)
    for part in ("n_layers", "nope", "n_haeds", "n_heads", "grru", "'attn'"):
        assert part in text
    assert ModelConfig.from_dict(small().config.to_dict()) == small().config


def test_compiled_gradients_equal_those_of_eager_with_packed_documents() -> None:
    mixers = {
        "g": {"type": "rnn", "cell": "paralstm", "n_heads": 4},
        "m": {"type": "mamba2", "head_dim": 16, "d_state": 8},
        "a": {"type": "attention", "n_heads": 4},
    }
    model = small(pattern=["g", "m", "a"], n_layers=3, mixers=mixers)
    ids = torch.randint(0, model.config.vocab_size, (2, 33))
    segments = (torch.arange(33) >= torch.tensor([[5], [20]])).int()
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        forward(ids, labels=ids, segment_ids=segments).loss_sum.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(results[1][name], gradient, atol=1e-5, rtol=1e-4)
