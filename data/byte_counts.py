"""How many bytes of UTF-8 tokens stand for, wherever a text is cut: what bits per byte divide by.

Decoding cannot tell. A character that is cut is decoded to U+FFFD, of three bytes, for each of its bytes; with bytes as a last resort (Llama 2) so is
every character of a run that begins or ends inside of one. A space that a row begins with is taken for the one that the tokenizer put before a text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

# Decoders that write a token alike wherever it stands, but for the first.
BY_TOKEN = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def bytes_of(tokenizer: Tokenizer, ids: np.ndarray, marks: Collection[int] = (), scored: np.ndarray | None = None) -> int:
    """Bytes of ids[1:], of those that are `scored` (n,) where that is given; ids[0] is what stands before them. marks, and special tokens, stand for
    none, and a text begins behind one of `marks`."""
    ids = ids.astype(np.int64, copy=False)  # 16 bits of a shard do not hold the length of a table of 65,536
    table, following = token_bytes(tokenizer), ids[1:] if scored is None else ids[1:][scored]
    if table is None:
        text = tokenizer.decode(following[~np.isin(following, list(marks))].tolist(), skip_special_tokens=True)
        return len(text.encode("utf-8", errors="surrogatepass"))
    inside, first = (np.append(part, 0)[np.minimum(ids[1:], len(part))] for part in table)
    sizes = np.where(np.isin(ids[:-1], list(marks)), first, inside)
    sizes[np.isin(ids[1:], list(marks))] = 0
    return int((sizes if scored is None else sizes[scored]).sum())


@functools.lru_cache(maxsize=8)
def token_bytes(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray] | None:
    """(bytes of each token within a text, of each that begins one); None where a token's text depends on others."""
    vocabulary = tokenizer.get_vocab()
    kinds, ids = _kinds(json.loads(tokenizer.to_str()).get("decoder")), sorted(vocabulary.values())
    if not kinds or not kinds <= BY_TOKEN:
        return None
    texts, bytes_ = tokenizer.decode_batch([[i] for i in ids]), {i for token, i in vocabulary.items() if BYTE.fullmatch(token)}
    # any token that is some text: the one of "a" a tokenizer of capitals or digits has not, and an unknown token may be no text
    letter = next(([i] for i, text in zip(ids, texts) if text.strip() and "\ufffd" not in text and i not in bytes_), [])
    if not letter:
        return None
    inside, first = np.zeros(ids[-1] + 1, np.int64), np.zeros(ids[-1] + 1, np.int64)
    alone = len(tokenizer.decode(letter).encode())
    first[ids] = [len(text.encode()) for text in texts]
    inside[ids] = [len(text.encode()) - alone for text in tokenizer.decode_batch([[*letter, i] for i in ids])]
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    for token, i in vocabulary.items():
        if i not in special and "ByteLevel" in kinds and alphabet.issuperset(token):
            inside[i] = first[i] = len(token)
        elif i not in special and "ByteFallback" in kinds and i in bytes_:
            inside[i] = first[i] = 1
    return inside, first


def _kinds(decoder: dict | None) -> set[str]:  # type: ignore[type-arg]
    """The types of a decoder and of those that it is made of."""
    if decoder is None:
        return set()
    return {kind for part in decoder["decoders"] for kind in _kinds(part)} if decoder["type"] == "Sequence" else {decoder["type"]}
