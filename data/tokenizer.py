"""Tokenizers: any Hugging Face tokenizer, a BPE trained on the spot, or bytes; always a `tokenizers.Tokenizer` saved beside its shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
REACH_SECONDS = 10.0
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
    """A byte-level BPE of `vocab_size` tokens, the end-of-text mark among them. Raises ValueError below 257."""
    if vocab_size < 257:
        raise ValueError(f"A byte-level vocabulary needs at least 257 tokens, not {vocab_size}.")
    tokenizer = _byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(spec: str) -> Tokenizer:
    """`bytes`, a tokenizer.json, a folder that holds one, or a name on the Hub. Raises ValueError in one sentence."""
    if spec == "bytes":
        return byte_tokenizer()
    path = Path(spec)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.is_file():
            tokenizer = Tokenizer.from_file(str(path))
        elif path.suffix == ".json" or str(spec).startswith((".", "/")):
            raise ValueError("there is no such file")
        else:
            from transformers import AutoTokenizer

            away = hub_away()
            try:
                tokenizer = AutoTokenizer.from_pretrained(spec, use_fast=True, local_files_only=bool(away)).backend_tokenizer
            except Exception as error:
                if away:
                    raise ValueError(f"{away}, and it is not in the cache") from error
                raise
    except Exception as error:  # tokenizers raises bare Exception, the Hub client many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"The tokenizer {spec} cannot be loaded: {reason}; give a tokenizer.json, a folder with one, a Hub name, bpe:SIZE or bytes."
        ) from error
    eot_id(tokenizer)
    return tokenizer


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


def byte_table(tokenizer: Tokenizer) -> np.ndarray | None:
    """Id of each of the 256 bytes when `tokenizer` is `byte_tokenizer()`, else None."""
    if fingerprint(tokenizer) != fingerprint(byte_tokenizer()):
        return None
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2's spelling of bytes: these as themselves,
    others = iter(range(0x100, 0x200))  # the others from U+0100 on
    spelling = {b: chr(b) if b in printable else chr(next(others)) for b in range(256)}
    return np.array([tokenizer.token_to_id(spelling[b]) for b in range(256)], dtype=np.uint32)


def eot_id(tokenizer: Tokenizer) -> int:
    """Id of the mark that starts every document. Raises ValueError when the tokenizer has none of the known names."""
    for name in END_NAMES:
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    raise ValueError(f"The tokenizer has no end-of-text token; it needs one of {', '.join(END_NAMES)}.")


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's canonical JSON."""
    return hashlib.sha256(json.dumps(json.loads(tokenizer.to_str()), sort_keys=True).encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """`fingerprint` of a tokenizer.json as it lies on disk, so that a newer library that writes it otherwise does not change it."""
    try:
        return hashlib.sha256(json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True).encode()).hexdigest()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; put it back or prepare the data again."
        ) from error


def encode_bare(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that truncates and pads nothing and reads the spelling of a special token in a text as plain text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy
