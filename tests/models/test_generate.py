"""Sampling against transformers' own processors, batches against single rows, stop conditions, and the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from data.errors import UserError
from data.tokenizer import byte_tokenizer
from evals.adapters.own import OwnAdapter
from models.cells import available as cells
from models.config import ModelConfig
from models.generate import generate, left_pad
from models.lm import LanguageModel
from models.sampling import LEAST, Sampling, TextStream
from models.session import Session
from scripts import generate as command
from tests.data.test_byte_counts import llama

V = 71
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"type": "attention", "n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
    "window": {"type": "attention", "n_heads": 2, "window": 4},
    "mamba2": {"type": "mamba2", "d_state": 8, "head_dim": 16, "n_groups": 2, "chunk": 5},
    **{name: {"type": "rnn", "cell": name, "n_heads": 2} for name in cells()},
    "m2rnn": {"type": "m2rnn", "n_heads": 2},
    "delta": {"type": "delta", "n_heads": 4, "n_k_heads": 2, "updates": 2, "negative": True},
    "bare": {"type": "rnn", "cell": "paragru", "gate": False, "norm": False, "d_conv": 0},
}
HYBRID = ["paragru", "mamba2", "window", "attention"]


def small(pattern: list[str], vocab_size: int = V, **settings: Any) -> LanguageModel:
    mixers = {name: MIXERS[name] for name in pattern}
    settings = {"vocab_size": vocab_size, "d_model": 32, "n_layers": len(pattern), "pattern": pattern, "mixers": mixers, **settings}
    model = LanguageModel(ModelConfig.from_dict(settings))
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, V, (n,), generator=generator).tolist() for n in lengths]


LOGITS = 3 * torch.randn(40, V, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, V, (40, 9), generator=torch.Generator().manual_seed(2))
FILTERS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"top_k": 7}, [TopKLogitsWarper(7)]),
    ({"top_k": 1000}, []),
    ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
    ({"min_p": 0.13}, [MinPLogitsWarper(0.13)]),
    ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
    ({"repetition_penalty": 0.6}, [RepetitionPenaltyLogitsProcessor(0.6)]),
    ({"temperature": 0.37}, [TemperatureLogitsWarper(0.37)]),
    (
        {"repetition_penalty": 1.3, "temperature": 1.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.9),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ],
    ),
]


@pytest.mark.parametrize("settings, theirs", FILTERS, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_filters_give_what_transformers_gives(settings: dict[str, Any], theirs: list[Any]) -> None:
    expected = LOGITS
    for processor in theirs:
        expected = processor(IDS, expected)
    seen = torch.zeros(40, V, dtype=torch.bool).scatter_(1, IDS, True)
    torch.testing.assert_close(Sampling(**{"temperature": 1.0, "top_k": None, **settings}).filtered(LOGITS, seen), expected)


def test_draws_follow_the_filtered_distribution_and_the_seed() -> None:
    logits = torch.tensor([[0.1, float("-inf"), 2.0, 1.0, float("-inf")]]).expand(20000, 5)
    sampling = Sampling(1.0, None)
    drawn = sampling.draw(logits, torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=5) / 20000
    assert (share - logits[0].softmax(-1)).abs().max() < 0.015 and share[1] == share[4] == 0
    assert torch.equal(drawn, sampling.draw(logits, torch.Generator().manual_seed(0)))
    assert Sampling(0).draw(LOGITS).equal(LOGITS.argmax(-1))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0}]
    + [{"temperature": 1e-320}, {"temperature": 1e-38}, {"repetition_penalty": 1e-300}, {"repetition_penalty": 1e300}],
    ids=str,
)
def test_a_value_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    """Logits divided by less than fp32 has are infinite or NaN, from which the last token of the vocabulary was drawn."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)


def test_the_least_values_draw_what_is_likeliest() -> None:
    logits = torch.where(LOGITS < 0, LOGITS * 1e30, LOGITS)
    assert Sampling(LEAST, top_k=None).draw(logits).equal(logits.argmax(-1))
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, IDS, True)
    wanted = torch.where(seen & (LOGITS > 0), LOGITS * 1e6, LOGITS).argmax(-1)
    assert Sampling(0, repetition_penalty=LEAST).draw(logits, seen_BV=seen).equal(wanted)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_a_padded_row_equals_the_row_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.session.CHUNK", 5)  # some chunks are padding only, some rows begin inside one
    model = small([name, name]).double()
    rows = prompts(16, 1, 7, 2)
    ids_BT, lengths = left_pad(rows, 0)
    forced = torch.tensor(prompts(6, 6, 6, 6))

    def run(ids: torch.Tensor, lengths: list[int] | None, new: torch.Tensor) -> torch.Tensor:
        session = command.Session(model, ids, lengths).read()
        with torch.no_grad():
            return torch.stack([session._feed(session.ids_BT.shape[1]), *(session._step(t[:, None]) for t in new.unbind(1))], 1)

    together = run(ids_BT, lengths, forced)
    for b, row in enumerate(rows):
        alone = run(torch.tensor([row]), None, forced[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=1e-5)
        with torch.no_grad():  # and the row read whole, without a state
            whole = model(torch.cat([torch.tensor([row]), forced[b : b + 1]], 1)).logits[:, len(row) - 1 :]
        torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_a_batch_of_different_lengths_writes_what_each_prompt_writes(penalty: float) -> None:
    model, rows = small(HYBRID), prompts(9, 1, 5)
    ids_BT, lengths = left_pad(rows, 0)
    together = generate(model, ids_BT, 12, temperature=0, lengths=lengths, repetition_penalty=penalty)
    for b, row in enumerate(rows):
        expected = list(row)
        for _ in range(12):  # the whole text again for every token
            with torch.no_grad():
                scores = model(torch.tensor([expected])).logits[:, -1]
            if penalty != 1:
                scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([expected]), scores)
            expected.append(int(scores.argmax()))
        assert together[b, ids_BT.shape[1] - len(row) :].tolist() == expected


def test_rows_end_at_their_stop_ids_and_are_filled() -> None:
    model = small(HYBRID)
    ids_BT, lengths = left_pad(prompts(4, 6), 0)
    free = generate(model, ids_BT, 40, temperature=1.0, top_k=None, lengths=lengths)[:, 6:]
    where = lambda token: [row.index(token) if token in row else 40 for row in free.tolist()]  # noqa: E731
    stop = next(t for t in free[0, 2:].tolist() if where(t)[0] < where(t)[1])
    first = where(stop)
    ended = generate(model, ids_BT, 40, temperature=1.0, top_k=None, lengths=lengths, eos_id=V - 1, stop_ids=[stop])[:, 6:]
    assert ended[0, : first[0] + 1].tolist() == free[0, : first[0] + 1].tolist() and set(ended[0, first[0] + 1 :].tolist()) <= {V - 1}
    assert ended[1].tolist()[: first[1]] == free[1].tolist()[: first[1]]
    count = generate(model, ids_BT, 40, temperature=0, lengths=lengths, stop_when=lambda row, token: True).shape[1]
    assert count == 7


def test_an_empty_prompt_in_a_batch_is_refused() -> None:
    for rows in ([[1, 2], []], []):
        with pytest.raises(ValueError, match="at least one token"):
            left_pad(rows, 0)
    model = small(["attention"])
    for ids in (torch.zeros(0, 3, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="at least one token"):
            Session(model, ids)


def test_lengths_are_those_of_the_rows() -> None:
    """One number for two rows was taken for both, and one beyond the row for all of it."""
    for lengths in ([2], [2, 2, 2], [2, 4]):
        with pytest.raises(ValueError, match="lengths must name 2 numbers of tokens"):
            generate(small(["attention"]), torch.ones(2, 3, dtype=torch.long), 1, lengths=lengths)


@pytest.mark.parametrize("made", [byte_tokenizer, llama], ids=["bytes", "llama"])
def test_a_stream_goes_on_inside_of_what_stood_before(made: Callable[[], Any]) -> None:
    """However many of the bytes before it are of one run, and wherever in a character the last eight tokens begin."""
    tokenizer, text = made(), "a cat 春眠不觉晓处处闻啼鸟 sat"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    for first in range(1, len(ids)):
        said = tokenizer.decode(ids[:first])
        if "\ufffd" not in said:
            stream = TextStream(tokenizer, ids[:first], ["闻"])
            assert "".join([*map(stream.push, ids[first:]), stream.finish()]) == text[len(said) :].partition("闻")[0]


def stream_of(text: str, stop: list[str]) -> tuple[list[str], TextStream]:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, tokenizer.encode("Before ").ids, stop)
    return [*(stream.push(i) for i in tokenizer.encode(text).ids), stream.finish()], stream


def test_text_comes_in_whole_characters_and_ends_before_a_stop_string() -> None:
    parts, stream = stream_of("naïve 漢字 🙂 end", [])
    assert "".join(parts) == stream.text == "naïve 漢字 🙂 end" and all("\ufffd" not in p for p in parts)
    parts, stream = stream_of("one\ntwo\n\nthree", ["\n\n", "three"])
    assert "".join(parts) == "one\ntwo" and stream.stopped
    parts, stream = stream_of("aab aac aa", ["aad"])  # what may become a stop string is held back, and given out in the end
    assert "".join(parts) == "aab aac aa" and parts[-1] == "aa" and not stream.stopped
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    stream.push(tokenizer.encode("é").ids[0])
    assert stream.finish() == "\ufffd"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    from data.files import write_json

    out = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    model = small(HYBRID, tokenizer.get_vocab_size())
    save_file(dict(model.state_dict()), out / "model.safetensors")
    write_json(out / "config.json", model.config.to_dict())
    tokenizer.save(str(out / "tokenizer.json"))
    return out


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = command.main([*arguments, "device=cpu"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_streams_one_prompt_and_batches_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = (f"checkpoint={folder}", "max_new_tokens=12", "temperature=0", "repetition_penalty=1.3", "top_k=0")
    lines = ["It was", "A somewhat\u2028longer\x0cprompt", "é"]
    alone = []
    for line in lines:
        status, out, _ = run(capsys, *common, f"prompt={line}")
        assert status == 0 and out.startswith(line)
        alone.append(out)
    (tmp_path / "p.txt").write_text("\n".join(lines) + "\n\n")
    status, out, _ = run(capsys, *common, f"prompts={tmp_path / 'p.txt'}", "batch=2")
    assert status == 0 and out == "".join(alone)
    assert run(capsys, *common, "prompt=It was", "precision=bf16")[0] == 0
    written = alone[0][len("It was") :].rstrip("\n")
    assert len(written) > 4
    status, out, _ = run(
        capsys, *common, "prompt=It was", f"stop=[{written[3:5]!r}]".replace("'", '"') if written[3:5].isalnum() else f"stop={written[3:5]}"
    )
    assert out == "It was" + written[: written.index(written[3:5])] + "\n"


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "checkpoint=DIR"),
        (["top_p=2", "min_p=-1"], "min_p must lie"),
        (["top_k=many"], "top_k must be a whole number"),
        (["temperature=hot"], "temperature must be a number"),
        (["prompt=a", "prompts=b"], "not both"),
        (["prompts=/nowhere"], "cannot be read"),
        (["stop=[1]"], "JSON list"),
        (["stop_ids=4,x"], "stop_ids"),
        (["stop_ids=4²"], "stop_ids"),
        (["stop_ids=100000"], "below 257"),
        (["temperature=nan"], "temperature must be zero (the likeliest token) or a finite number from 1e-06 on, not nan"),
        (["repetition_penalty=inf"], "repetition_penalty must be from 1e-06 to 1,000,000 (1: none), not inf"),
        (["seed=99999999999999999999"], "seed must be a whole number from 0 up to 2^63"),
        (["document=/dev/null"], "document=/dev/null is empty"),
        (["save=/tmp"], "save=/tmp is a folder"),
        (["save=README.md"], "README.md exists and is no session, so it is not written over"),
        (["precision=int3"], "choose fp32 or bf16"),
        (["promt=x"], "did you mean 'prompt"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) and v else "",
)
def test_a_mistake_is_one_sentence(folder: Path, words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *([f"checkpoint={folder}"] if words else []), *words)
    assert status == 2 and part in err and err.startswith("error: ") and not out


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("when", ["at once", "later"])
def test_nothing_is_drawn_from_logits_that_are_not_finite(temperature: float, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(["paragru"])
    whole: Any = type(model).forward

    def broken(self: LanguageModel, ids: torch.Tensor, **more: Any) -> Any:
        output = whole(self, ids, **more)
        if when == "at once" or ids.shape[1] == 1:
            output.logits[0, :, 5] = torch.nan if temperature else torch.inf
        return output

    monkeypatch.setattr(type(model), "forward", broken)
    ids, lengths = left_pad(prompts(6, 4), 0)
    with pytest.raises(UserError, match="^The logits are not finite: "):
        Session(model, ids, lengths).generate(5, Sampling(temperature=temperature))


def test_ids_that_the_model_does_not_have_are_told() -> None:
    """Of a tokenizer that is another model's, or has had tokens added; the embedding would be read past its end."""
    model = small(["attention"])
    with pytest.raises(UserError, match=f"^The token id {V} of the text is beyond the {V} tokens of the model"):
        Session(model, torch.tensor([[1, V, 2]]))
    with pytest.raises(UserError, match="^The token id 500 of"):
        Session(model, torch.tensor([[1, V - 1, 2]])).append(torch.tensor([[500]]))
    adapter = OwnAdapter(model, None, "x", "")
    for ids in ([[0, 1, V, 3]], [[0, 1, 2, V]]):
        with pytest.raises(UserError, match=f"^The token id {V} of"):
            adapter.stream(torch.tensor(ids), 8, lambda *_: None)
