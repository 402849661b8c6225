"""Tokenizers: any Hugging Face tokenizer, a BPE trained on the spot, or bytes; always a `tokenizers.Tokenizer` saved beside its shards.

Text becomes ids in one way everywhere: `TextCoder.encode`, by the bare tokenizer (no template, no truncation or padding that it may have stored,
the spelling of a special token is plain text). What stands around a document is what `marks_of` says of the tokenizer's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.errors import UserError

END_OF_TEXT = "<|endoftext|>"
REACH_SECONDS = 10.0
LARGEST_BPE = 4_000_000
LONGEST_WORD = 1000
LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]")


def _byte_level(vocabulary: dict[str, int] | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary or {}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """256 bytes and the end-of-text mark."""
    tokenizer = _byte_level({symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))})
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens, the end-of-text mark among them. Raises UserError below 257, and above what any model has."""
    if vocab_size < 257:
        raise UserError(f"A byte-level vocabulary needs at least 257 tokens, not {vocab_size}.")
    if vocab_size > LARGEST_BPE:  # memory for all of them is taken at once, and the process dies where there is none
        raise UserError(f"A vocabulary has at most {LARGEST_BPE:,} tokens, not {vocab_size:,}; published models have 32,000 to 262,144.")
    tokenizer = _byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_long_words(texts), trainer)
    return tokenizer


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut inside of what has LONGEST_WORD characters without a space (or of spaces): the trainer takes time with the square of a word's
    length, minutes for a sequence of DNA or a packed picture of 100 kB, and hears no Ctrl-C meanwhile."""
    for text in texts:
        start = 0
        for run in LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


@dataclass(frozen=True)
class Marks:
    """Ids around a document: `start` before it, `end` after it. end is None where the next start says that it ended; start where there is no mark."""

    start: int | None
    end: int | None = None

    @property
    def start_ids(self) -> list[int]:
        """What every text begins with."""
        return [] if self.start is None else [self.start]

    @property
    def end_ids(self) -> list[int]:
        """What ends a text that a model writes: its own end, or the start of another."""
        return [i for i in (self.end, self.start) if i is not None]


def marks_of(tokenizer: Tokenizer, folder: Path | None = None) -> Marks:
    """The marks that the tokenizer_config.json (or special_tokens_map.json) beside a tokenizer.json names: bos before a document and eos after
    it, or eos alone before it. Where they name none: the first of END_NAMES that the tokenizer has."""
    named: dict[str, int] = {}
    for path in () if folder is None else (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for key in ("bos_token", "eos_token"):
            token = values.get(key) if isinstance(values, dict) else None
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and (token_id := tokenizer.token_to_id(token)) is not None:
                named[key] = token_id
    return marks_from(tokenizer, named.get("bos_token"), named.get("eos_token"))


def marks_from(tokenizer: Tokenizer, bos: int | None, eos: int | None) -> Marks:
    """The marks that follow from a begin and an end token, of which either may be missing."""
    if bos is not None:
        return Marks(bos, None if eos == bos else eos)
    if eos is not None:
        return Marks(eos)
    return Marks(next((token_id for name in END_NAMES if (token_id := tokenizer.token_to_id(name)) is not None), None))


def tokenizer_config(tokenizer: Tokenizer, marks: Marks) -> dict[str, Any]:
    """The tokenizer_config.json that says `marks`, for `marks_of` and for transformers."""
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if marks.start is not None:
        values["bos_token"] = tokenizer.id_to_token(marks.start)
        values["eos_token"] = tokenizer.id_to_token(marks.start if marks.end is None else marks.end)
    return values


class TextCoder:
    """Text to ids and back, the same for prepare, generation, samples, evaluation and export; `start_ids` is what every document begins with."""

    def __init__(self, tokenizer: Tokenizer, start_ids: list[int], special_ids: set[int], end_ids: list[int] | None = None) -> None:
        self.start_ids, self.special_ids = start_ids, special_ids
        self.end_ids = start_ids if end_ids is None else end_ids
        self.tokenizer = reader_of(tokenizer, [*self.start_ids, *self.end_ids])

    def encode(self, text: str, start: bool = False) -> list[int]:
        """Ids of the text, with `start_ids` before them where it begins a document. Raises UserError where the tokenizer has none for a part of it."""
        with no_unknown_token():
            return [*(self.start_ids if start else ()), *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def coder_of(tokenizer: Tokenizer, folder: str | Path | None = None, marks: Marks | None = None) -> TextCoder:
    """The coder of a tokenizer and the folder it lies in, a checkpoint or one from elsewhere. marks: where they are known."""
    marks = marks or marks_of(tokenizer, None if folder is None else Path(folder))
    known = {i for name in END_NAMES if (i := tokenizer.token_to_id(name)) is not None}
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return TextCoder(tokenizer, marks.start_ids, known | special | set(marks.end_ids), marks.end_ids)


def load_tokenizer(spec: str) -> tuple[Tokenizer, Marks]:
    """`bytes`, a tokenizer.json, a folder that holds one, or a name on the Hub, and the marks of documents. Raises UserError in one sentence."""
    if spec == "bytes":
        tokenizer = byte_tokenizer()
        return tokenizer, marks_of(tokenizer)
    path = Path(spec)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.is_file():
            tokenizer = Tokenizer.from_file(str(path))
            marks = marks_of(tokenizer, path.parent)
        elif path.suffix == ".json" or str(spec).startswith((".", "/")):
            raise UserError("there is no such file")
        else:
            from transformers import AutoTokenizer

            away = hub_away()
            try:
                named = AutoTokenizer.from_pretrained(spec, use_fast=True, local_files_only=bool(away))
            except Exception as error:
                if away:
                    raise UserError(f"{away}, and it is not in the cache") from error
                raise
            tokenizer = named.backend_tokenizer
            marks = marks_from(tokenizer, named.bos_token_id, named.eos_token_id)
    except Exception as error:  # tokenizers raises bare Exception, the Hub client many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The tokenizer {spec} cannot be loaded: {reason}; give a tokenizer.json, a folder with one, a Hub name, bpe:SIZE or bytes."
        ) from error
    if marks.start is None:
        raise UserError(
            f"The tokenizer has no end-of-text token; it needs one of {', '.join(END_NAMES)}, or a tokenizer_config.json beside it that names one."
        )
    return tokenizer, marks


def hub_away() -> str:
    """Why nothing can be fetched from the Hub now, after one attempt of a few seconds; '' when it answers. Its own client tries for a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
        return ""
    except Exception as error:  # of whichever HTTP library the client uses
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        return f"{constants.ENDPOINT} cannot be reached ({reason})"


def unknown_id(tokenizer: Tokenizer, marks: Collection[int]) -> int | None:
    """The token that stands for text which the tokenizer has none for; None where it has such a token for every text, leaves it out, or has one of
    `marks` for it, which cannot be told from those around documents."""
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model["unk_id"] if model.get("unk_id") is not None else tokenizer.token_to_id(model.get("unk_token") or "")
    return None if unknown in marks else unknown


def has_every_byte(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has a token for each of the 256 bytes, in the spelling of byte-level tokenizers."""
    return all(tokenizer.token_to_id(letter) is not None for letter in pre_tokenizers.ByteLevel.alphabet())


def byte_table(tokenizer: Tokenizer) -> np.ndarray | None:
    """Id of each of the 256 bytes when `tokenizer` is `byte_tokenizer()`, else None."""
    if fingerprint(tokenizer) != fingerprint(byte_tokenizer()):
        return None
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2's spelling of bytes: these as themselves,
    others = iter(range(0x100, 0x200))  # the others from U+0100 on
    spelling = {b: chr(b) if b in printable else chr(next(others)) for b in range(256)}
    return np.array([tokenizer.token_to_id(spelling[b]) for b in range(256)], dtype=np.uint32)


def eot_id(tokenizer: Tokenizer) -> int:
    """Id of the mark that starts documents where nothing but the tokenizer is known. Raises UserError when it has none of the known names."""
    start = marks_of(tokenizer).start
    if start is None:
        raise UserError(f"The tokenizer has no end-of-text token; it needs one of {', '.join(END_NAMES)}.")
    return start


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's canonical JSON."""
    return hashlib.sha256(json.dumps(json.loads(tokenizer.to_str()), sort_keys=True).encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """`fingerprint` of a tokenizer.json as it lies on disk, so that a newer library that writes it otherwise does not change it."""
    try:
        return hashlib.sha256(json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True).encode()).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; put it back or prepare the data again."
        ) from error


def encode_bare(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that truncates and pads nothing, drops no merges at random, and does not look for special tokens in a text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    if getattr(copy.model, "dropout", None):
        copy.model.dropout = None
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy


def reader_of(tokenizer: Tokenizer, marks: Iterable[int] = ()) -> Tokenizer:
    """What texts are read with: `encode_bare`, for which no text spells a special token, or one of `marks`, and which decodes neither.

    Models that look whole pieces of a text up (Unigram, as of T5, and of words) have special tokens among these. A piece that spells one is cut behind
    its first letter, which changes no other text.
    """
    copy = encode_bare(tokenizer)
    special = {token.content for token in copy.get_added_tokens_decoder().values() if token.special}
    named = {name for i in marks if (name := copy.id_to_token(i)) is not None} - special
    copy.add_special_tokens(sorted(named))
    special |= named
    pieces = copy.get_vocab(with_added_tokens=False)
    spelt = [name for name in sorted(special) if len(name) > 1 and name in pieces]
    if spelt and (not isinstance(copy.model, models.BPE) or copy.model.ignore_merges):
        cut = "|".join(f"{_letters(name[0])}(?={_letters(name[1:])})" for name in spelt)
        steps = [copy.pre_tokenizer] if copy.pre_tokenizer is not None else []
        copy.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.Split(Regex(cut), "isolated")])
    return copy


def _letters(text: str) -> str:
    """A regular expression of `tokenizers` that matches the text itself."""
    return "".join(f"\\x{{{ord(letter):x}}}" for letter in text)


@contextlib.contextmanager
def no_unknown_token() -> Iterator[None]:
    """Inside, a tokenizer that meets what it has no token for is a UserError; `tokenizers` raises bare Exceptions."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise UserError(
            f"The tokenizer has no token for a part of the text, nor one for what it does not know ({str(error).rstrip('.')}); give other text, or"
            " another tokenizer (bpe:SIZE and bytes have a token for every text)."
        ) from error
