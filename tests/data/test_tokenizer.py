"""One way from text to ids: a tokenizer that stores a template, truncation and padding gives the same ids wherever text is read."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from data.encode import Encoder
from data.errors import UserError
from data.prepare import main
from data.shards import ShardSet
from data.tokenizer import Marks, coder_of, encode_bare, load_tokenizer, marks_of, train_bpe
from evals.adapters.hf import hf_coder
from evals.adapters.load import load_adapter
from models.config import ModelConfig
from models.hub.export import write_folder
from models.hub.importing import import_folder
from scripts.generate import DEFAULTS, Writer
from tests.hub.folders import checkpoint

WORDS = ["[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "over", "the", "fox", "<", "s", ">", "/"]
TEXT = "the fox over <s> " * 20
PLAIN = ["the", "fox", "over", "<", "s", ">"] * 20
ATTENTION = ModelConfig(
    vocab_size=16, d_model=16, n_layers=1, d_ff=32, pattern=["attention"], mixers={"attention": {"type": "attention", "n_heads": 2}}
)


def awkward() -> Tokenizer:
    """Adds [CLS] and [SEP], cuts after 16 ids, pads to 20, and has tokens for the begin and the end of a text."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Split("<", "isolated")]
    )
    tokenizer.add_special_tokens([AddedToken(w, special=True) for w in WORDS[1:5]])
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=20)
    return tokenizer


def folder_of(path: Path, **named: Any) -> Path:
    """A checkpoint whose tokenizer is the awkward one, with a tokenizer_config.json that names tokens."""
    checkpoint(path, ATTENTION)
    awkward().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    return path


LLAMA = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}


@pytest.mark.parametrize(
    "named, marks",
    [
        (LLAMA, (3, 4)),
        ({"bos_token": "</s>", "eos_token": "</s>"}, (4, None)),
        ({"eos_token": "<s>"}, (3, None)),
        ({"bos_token": None}, (4, None)),
        ({"bos_token": "[new]"}, (4, None)),
    ],
)
def test_a_folder_says_what_stands_around_its_documents(named: dict[str, Any], marks: tuple[int, int | None], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "c", **named)
    assert marks_of(awkward(), folder) == Marks(*marks) == load_tokenizer(str(folder / "tokenizer.json"))[1]
    coder = hf_coder(str(folder))
    assert coder is not None and coder.start_ids == [marks[0]] and coder.encode(TEXT) == [WORDS.index(w) for w in PLAIN]


def test_every_reader_of_text_gives_the_ids_that_prepare_wrote(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "c", **LLAMA)
    inner = [WORDS.index(w) for w in PLAIN]
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 2)
    assert main([f"input={tmp_path / 'a.jsonl'}", f"out={tmp_path / 'shards'}", f"tokenizer={folder}", "valid_docs=[1]"]) == 0
    shards = ShardSet(tmp_path / "shards", "train")
    assert shards.document(0)[0].tolist() == [3, *inner, 4] and shards.marks == Marks(3, 4)
    assert (
        shards.coder().encode(TEXT, start=True) == [3, *inner] == coder_of(shards.tokenizer(), tmp_path / "shards").encode(TEXT, start=True)
    )

    writer = Writer({**DEFAULTS, "checkpoint": str(folder), "prompt": TEXT, "device": "cpu"})
    assert writer.ids(TEXT) == [3, *inner] and writer.ids(TEXT, start=False) == inner and {3, 4} <= set(writer.stop_ids)
    adapter = load_adapter(str(folder))
    assert adapter.need_coder().encode(TEXT, start=True) == [3, *inner]

    (tmp_path / "out").mkdir()
    write_folder(folder, tmp_path / "out", "fp32", 10**9, "mit")
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("the fox " * 20).input_ids == inner[:2] * 20  # no template, nothing cut
    assert (exported.bos_token_id, exported.eos_token_id) == (3, 4)
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (ends["bos_token_id"], ends["eos_token_id"]) == (3, 4)
    there, back = hf_coder(str(tmp_path / "out")), load_adapter(str(import_folder(tmp_path / "out", tmp_path / "back"))).need_coder()
    assert there is not None and there.encode(TEXT, start=True) == back.encode(TEXT, start=True) == [3, *inner]


def test_samples_in_training_and_checkpoints_begin_as_the_shards_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from evals import in_loop

    seen: list[torch.Tensor] = []

    def generate(model: Any, prompt: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen.append(prompt)
        return prompt

    folder = folder_of(tmp_path / "c", **LLAMA)
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 2)
    assert main([f"input={tmp_path / 'a.jsonl'}", f"out={tmp_path / 'shards'}", f"tokenizer={folder}", "valid_docs=[1]"]) == 0
    shards = ShardSet(tmp_path / "shards", "train")
    assert marks_of(shards.tokenizer(), _written(tmp_path / "again", shards.tokenizer_config())) == Marks(3, 4)
    monkeypatch.setattr(in_loop, "generate", generate)
    evaluator = in_loop.TextEvaluator.__new__(in_loop.TextEvaluator)
    world = SimpleNamespace(main=True, device="cpu", barrier=lambda: None)
    module = torch.nn.Linear(1, 1)
    evaluator.engine = SimpleNamespace(world=world, gathered=lambda _: torch.no_grad(), parameters=[], module=module)  # type: ignore[assignment]
    evaluator.config = SimpleNamespace(eval=SimpleNamespace(sample_prompt="the fox", sample_tokens=1))  # type: ignore[assignment]
    evaluator.metrics = SimpleNamespace(keep=lambda name, write: write(tmp_path / name), say=print)  # type: ignore[assignment]
    evaluator.train = shards
    assert evaluator.sample(1) == "the fox" and seen[0].tolist() == [[3, 6, 7]]
    nothing = coder_of(Tokenizer(models.WordLevel({"</s>": 0, "A": 1})))
    evaluator.train = SimpleNamespace(coder=lambda: nothing)  # type: ignore[assignment]
    assert evaluator.sample(2) == "" and "no sample after step 2: The tokenizer has no token" in capsys.readouterr().out


def _written(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def test_a_word_without_end_is_cut_before_a_tokenizer_learns_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's time goes with the square of a word's length: a sequence of DNA of 1 MB would take it hours."""
    seen: list[str] = []
    monkeypatch.setattr(Tokenizer, "train_from_iterator", lambda self, texts, trainer: seen.extend(texts))
    texts = ["it was " * 500, "ACGT" * 625 + " and" + "\n" * 2001 + "on", "", "é" * 1000]
    train_bpe(texts, 300)
    assert "".join(seen) == "".join(texts) and seen[0] == texts[0]
    assert max(len(word) for text in seen for word in re.findall(r"\S+|\s+", text)) == 1000


def test_text_that_a_tokenizer_has_no_token_for_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that predicts the unknown token well gets the best bits per byte of all: 0.15 of a text that was lost to nine tenths."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / f"in/{i}.txt").write_text(f"the fox {'jumped over' if i else 'over'} the zebra <s>")
    for spec, lost in ((folder_of(tmp_path / "words"), "lost, 7 of 39 tokens (17.9%) are '[UNK]'"), ("bpe:300", ""), ("bytes", "")):
        out = tmp_path / f"out{len(str(spec))}"
        assert main([f"input={tmp_path / 'in'}", f"out={out}", f"tokenizer={spec}", "shard_tokens=5"]) == 0
        told = json.loads((out / "meta.json").read_text())["left_out"]
        assert (lost in capsys.readouterr().out and told[0].startswith(lost)) if lost else not told


LETTERS = "abcdefghijklmnopqrstuvwxyz</>|"
PIECES = [("<unk>", 0.0), ("</s>", 0.0), ("<|x|>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]


def whole_pieces(kind: str) -> Tokenizer:
    """A tokenizer whose model finds its special tokens in a text, of which one is not told to be special."""
    if kind.startswith("unigram"):  # as of T5
        tokenizer = Tokenizer(models.Unigram(PIECES, 0, False))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        model = models.WordLevel if kind == "words" else models.WordPiece
        words = ["<unk>", "</s>", "<|x|>", *LETTERS, *(f"##{letter}" for letter in LETTERS if kind == "pieces"), "the"]
        tokenizer = Tokenizer(model({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<|x|>", special=True)])
    if kind.endswith("plain"):
        tokenizer.add_tokens([AddedToken("</s>", special=False)])
    return tokenizer


@pytest.mark.parametrize("kind", ["unigram", "unigram, plain", "words", "pieces"])
def test_no_text_spells_a_mark_or_a_special_token(kind: str) -> None:
    tokenizer, marks = whole_pieces(kind), Marks(1)
    coder, encoder = coder_of(tokenizer, marks=marks), Encoder(tokenizer, marks)
    for text in ("the </s> the", "</s>", "<|x|></s><|x|>", "a<|x|> </s></s>", "</ s> < /s>", "<</s>>"):
        ids = coder.encode(text)
        assert ids and not {1, 2} & set(ids) and encoder.encode([text])[0].tolist() == [1, *ids]
    draw, plain = random.Random(0), encode_bare(tokenizer)
    for _ in range(200):  # what spells neither has the ids that it had
        text = "".join(draw.choices(LETTERS + "  ", k=12)).replace("</s>", "").replace("<|x|>", "")
        assert coder.encode(text) == plain.encode(text).ids
    assert coder.decode([1, *coder.encode("the"), 1, 2]) == coder.decode(coder.encode("the"))


def test_merges_are_not_dropped_at_random() -> None:
    tokenizer = train_bpe(["the fox over the fox " * 20], 280)
    tokenizer.model.dropout = 0.5
    coder, encoder = coder_of(tokenizer), Encoder(tokenizer)
    once = coder.encode("the fox over the fox")
    assert all(coder.encode("the fox over the fox") == once == encoder.encode(["the fox over the fox"])[0].tolist()[1:] for _ in range(20))


@pytest.mark.parametrize(
    "model", [models.WordLevel({"</s>": 0, "a": 1}), models.WordPiece({"</s>": 0, "a": 1}), models.Unigram([("</s>", 0.0)])]
)
def test_what_no_token_stands_for_ends_in_a_sentence(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a zebra")
    assert main([f"input={tmp_path / 'a.txt'}", f"out={tmp_path / 'out'}", f"tokenizer={tmp_path / 'tokenizer.json'}"]) == 2
    assert "error: The tokenizer has no token for a part of the text" in capsys.readouterr().err
    with pytest.raises(UserError, match="no token for a part of the text"):
        coder_of(Tokenizer(model)).encode("zebra")


def test_text_that_a_tokenizer_leaves_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["</s>", *"abcdefghij"])}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.txt").write_text("abc z " * (2 + i))
    spec = ["shard_tokens=7", f"input={tmp_path / 'in'}"]
    assert main([*spec, f"out={tmp_path / 'out'}", f"tokenizer={tmp_path / 'tokenizer.json'}"]) == 0
    assert "changed, 54 bytes of text have become tokens that stand for 27" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["left_out"][0].startswith("changed, 54 bytes")


def test_shards_made_before_marks_were_written_are_read_as_before() -> None:
    encoder = Encoder(awkward())
    assert encoder.marks == Marks(4) and encoder.encode(["the"])[0].tolist() == [4, 6]
