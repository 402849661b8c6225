"""Bytes of tokens, however a text is cut, against the bytes of the text itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.byte_counts import bytes_of, token_bytes
from data.prepare import main as prepare
from data.shards import ShardSet
from data.tokenizer import byte_tokenizer, train_bpe
from evals.measures.perplexity import held_out_rows, text_bytes

LEARNT = ["the cat sat on the mat, and the dog too. Straße, naïve café", "мой дядя самых честных правил"] * 9
SPECIAL = ["<unk>", "<s>", "</s>"]


def llama() -> Tokenizer:
    """As Llama 2's: words begin with a mark for the space before them, characters that were not learnt are bytes."""
    learnt = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learnt.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learnt.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    learnt.train_from_iterator(LEARNT[::2], trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False))
    spec = json.loads(learnt.to_str())
    size = len(spec["model"]["vocab"])
    spec["model"]["vocab"] |= {f"<0x{b:02X}>": size + b for b in range(256)}
    return Tokenizer.from_str(json.dumps(spec))


def metaspace() -> Tokenizer:
    learnt = Tokenizer(models.Unigram())
    learnt.pre_tokenizer, learnt.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    learnt.train_from_iterator(LEARNT, trainer)
    return learnt


def gpt2_with_a_template() -> Tokenizer:
    """What stands around a document is no text, nor is a mark that is added as plain text counted by its spelling."""
    learnt = train_bpe(LEARNT, 300)
    learnt.add_tokens(["<tool>"])
    learnt.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
    return learnt


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_tokenizer,
    "bpe": lambda: train_bpe(LEARNT, 320),
    "llama": llama,
    "metaspace": metaspace,
    "added": gpt2_with_a_template,
}
PARTS = ["the cat ", "sat", " ", "  ", "дядя ", "é", "ß", ", ", "and the"]
FOREIGN = ["春眠不觉晓", "😀", "हि", "\n", "\t", "<tool>", "\u0301"]  # of which Unigram has no token, so that they are lost


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up_to_the_text(kind: str) -> None:
    tokenizer, draw = KINDS[kind](), random.Random(kind)
    mark = tokenizer.get_vocab()["<s>" if kind in ("llama", "metaspace") else "<|endoftext|>"]
    for _ in range(20):
        parts = PARTS if kind == "metaspace" else PARTS + FOREIGN
        texts = ["x" + "".join(draw.choices(parts, k=draw.randrange(30))) + "x" for _ in range(4)]
        if kind == "metaspace":
            texts = ["the" + text[1:-1] + "the" for text in texts]
        ids = np.array([i for text in texts for i in (mark, *tokenizer.encode(text, add_special_tokens=False).ids)], np.int64)
        cuts = sorted({0, len(ids) - 1, *draw.sample(range(len(ids) - 1), 5)})
        pieces = [bytes_of(tokenizer, ids[a : b + 1], [mark]) for a, b in zip(cuts, cuts[1:])]
        assert sum(pieces) == sum(len(text.encode()) for text in texts)
        scored = np.array([draw.random() < 0.5 for _ in ids[1:]])
        halves = [bytes_of(tokenizer, ids, [mark], s) for s in (scored, ~scored)]
        assert sum(halves) == sum(pieces) and min(halves) >= 0


def test_ids_of_16_bits_of_a_whole_vocabulary() -> None:
    tokenizer = Tokenizer(models.Unigram([("</s>", 0.0), ("▁", -2.0), *((f"x{i}", -3.0) for i in range(65534))], None, False))
    tokenizer.decoder = decoders.Metaspace()
    assert bytes_of(tokenizer, np.array([0, 2, 65535], np.uint16), [0]) == len("x0x65533")


@pytest.mark.parametrize("unknown", [True, False])
def test_a_tokenizer_that_has_no_a(unknown: bool) -> None:
    """Of capitals and digits: words were taken for those that begin a text, without their spaces, or there was a traceback."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "ACGT0123"), ("▁GT", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces if unknown else pieces[1:], 0 if unknown else None, False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL[::2] if unknown else SPECIAL[2:])
    mark, text = tokenizer.get_vocab()["</s>"], "GT GT AC 01 GT"
    ids = np.array([mark, *tokenizer.encode(text, add_special_tokens=False).ids])
    assert bytes_of(tokenizer, ids, [mark]) == len(text)
    assert bytes_of(tokenizer, ids[:2], [mark]) + bytes_of(tokenizer, ids[1:], [mark]) == len(text)


def test_words_that_depend_on_their_neighbours_are_decoded() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, ".": 3, "a": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    assert token_bytes(tokenizer) is None
    assert bytes_of(tokenizer, np.array([4, 1, 2, 3])) == len("playing.")


def test_rows_of_a_split_add_up_to_its_bytes(tmp_path: Path) -> None:
    """Rows end inside of characters: as they were decoded one by one, these had 5 % more bytes than the text."""
    records = [json.dumps({"text": "Мой дядя самых честных правил, " * 9 + str(i)}) for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    assert prepare([f"input={tmp_path / 'a.jsonl'}", f"out={tmp_path / 'x'}", "tokenizer=bytes", "valid_fraction=0.5", "workers=1"]) == 0
    shards = ShardSet(tmp_path / "x", "valid")
    for length in (7, 32, 1000):
        assert sum(text_bytes(shards, tokens) for tokens, _ in held_out_rows(shards, length, None)) == shards.n_bytes
