"""Answers in the ids that a model would write, word lists without anything to copy, and what is scored without reading."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from data.tokenizer import TextCoder, byte_tokenizer, coder_of
from evals.adapters.base import Adapter, ItemError
from evals.inputs.tasks import Sample, Task, after_question
from evals.measures.retrieval import grid, without_reading


def sentencepiece_like() -> Tokenizer:
    """As Llama-2's and Mistral's: a mark for each space and one before every text, bytes for what is not in the vocabulary."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *map(chr, range(33, 127)),
        "is",
        "▁is",
        "▁T",
        "▁pass",
        "ke",
    ]
    merges = [("i", "s"), ("▁", "is"), ("▁", "T"), ("k", "e")]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


class Reader(Adapter):
    """A perfect model: it finds the key in the text of its prompt, and writes the tokens that the whole text with the key would have."""

    carry, name, folder = "chunks", "reader", "reader"

    def __init__(self, coder: TextCoder) -> None:
        self.coder = coder

    def hits(self, prompt_BT: torch.Tensor, answer_BA: torch.Tensor, chunk: int) -> torch.Tensor:
        answered = []
        for prompt, answer in zip(prompt_BT.tolist(), answer_BA.tolist()):
            text = self.need_coder().decode(prompt)
            asked = re.search(r"(?:passkey|special magic number for ([a-z-]+)) is$", text)
            assert asked is not None
            pattern = r"The\s+passkey is (\d{5})\." if asked[1] is None else rf"magic numbers for {asked[1]} is: (\d+)\."
            key = re.search(pattern, text)
            assert key is not None
            whole = self.need_coder().encode(text + " " + key[1])
            tail = next(whole[i + 8 :] for i in range(len(whole) - 8, 0, -1) if whole[i : i + 8] == prompt[-8:])
            answered.append(tail == [i for i in answer if i != -100])
        return torch.tensor(answered)


@pytest.mark.parametrize("name", ["passkey", "niah_single", "niah_multikey"])
@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_like])
def test_a_perfect_model_finds_every_key_with_any_tokenizer(name: str, make: Any) -> None:
    result = grid(Reader(coder_of(make())), Task(name), 1500, [0.2, 0.8], 4)
    assert result["accuracy"] == 1.0 and result["without_reading"]["chance"] < 1e-4


def test_the_answer_is_what_follows_the_question() -> None:
    coder = coder_of(sentencepiece_like())
    question, answer = after_question(coder, "The passkey is", " 01234")
    assert question + answer == coder.encode("The passkey is 01234") and question == coder.encode("The passkey is")
    assert answer != coder.encode(" 01234") and len(answer) == 6
    merging = coder_of(sentencepiece_like())
    assert after_question(merging, "a k", "e") == (merging.encode("a k")[:-1], [merging.tokenizer.token_to_id("ke")])


@pytest.mark.parametrize("name, lengths", [("cwe", (1300, 1500, 4000)), ("fwe", (500, 800, 3000))])
def test_word_lists_are_full_of_words_and_copying_them_scores_little(name: str, lengths: tuple[int, ...]) -> None:
    coder, task = coder_of(byte_tokenizer()), Task(name)
    for length in lengths:
        samples = [task.sample(coder, length, 0.5, n, seed=0) for n in range(20)]
        for sample in samples:
            text = coder.decode(sample.body)
            words = Counter(text.split())
            wanted = min(words[w] for w in sample.answers)
            assert len(sample.prompt) == length and "\n" not in text and wanted >= 2
            assert wanted > max(n for w, n in words.items() if w not in sample.answers)
        beside = without_reading(coder, task, samples)
        assert set(beside) == {"chance", "copies the beginning", "copies the end", "copies from anywhere"}
        assert all(value < 0.45 for value in beside.values()) and any(value > 0 for value in beside.values())
    with pytest.raises(ItemError, match="ask for .* tokens more"):
        task.sample(coder, 300, 0.5, 0, seed=0)


def test_chance_and_copiers_are_those_of_the_samples() -> None:
    coder = coder_of(byte_tokenizer())
    assert without_reading(coder, Task("passkey", keys=4), [Task("passkey", keys=4).sample(coder, 900, 0.5, 0, 0)])["names any key"] == 0.25
    sample = Sample([1], coder.encode(" a b"), ["a", "b"], 3, coder.encode("a x x x x x x x b"), 0.5)
    beside = without_reading(coder, Task("vt"), [sample])
    assert beside["chance"] == beside["copies the beginning"] == beside["copies the end"] == 0.5
    assert sample.copies(np.random.default_rng(0))["copies the end"] == coder.encode("x b")[-3:]
