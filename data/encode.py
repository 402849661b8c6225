"""Documents to token ids on all cores, in order, while the next ones are read and the last ones are written.

The tokenizer's own threads share a batch document by document, so a few long documents would leave cores idle. They are cut first, but only
where the ids cannot change: see `can_cut`. Byte tokenizers are a table look-up.
"""

from __future__ import annotations

import json
import queue
import re
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.tokenizer import Marks, byte_table, marks_of, no_unknown_token, reader_of

BATCH_DOCUMENTS, BATCH_CHARACTERS = 128, 4_000_000
PIECE_CHARACTERS = 50_000
CUT = re.compile(r"[A-Za-z](?=[ \n])")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = (_WORDS % "", _WORDS % "{1,3}")  # of Qwen 2 and Llama 3; GPT-2's is built into ByteLevel


def can_cut(tokenizer: Tokenizer) -> bool:
    """Whether cutting a text between an ASCII letter and a space or newline leaves its ids as they are.

    True for byte-level BPE whose pre-tokenizer is known to end a word there whatever surrounds it (no pattern looks back, and what looks
    ahead, looks at spaces only, which all lie in the second piece), without a normalizer but NFC (which joins nothing there).
    """
    spec = json.loads(tokenizer.to_str())
    model, normalizer, splitter = spec["model"], spec["normalizer"], spec["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("dropout") or (normalizer and normalizer["type"] != "NFC") or not splitter:
        return False
    for token in spec["added_tokens"]:
        if not token["special"] and (token["lstrip"] or token["rstrip"] or token["single_word"] or CUT.search(token["content"] + " ")):
            return False
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    if [s["type"] for s in steps] == ["ByteLevel"]:
        return steps[0].get("use_regex", True) and not steps[0]["add_prefix_space"]
    if [s["type"] for s in steps] == ["Split", "ByteLevel"]:
        known = steps[0]["pattern"].get("Regex") in KNOWN_PATTERNS and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
        return known and not steps[1].get("use_regex", True) and not steps[1]["add_prefix_space"]
    return False


def pieces(text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """`text` in pieces of about `size` characters, each but the last ending in a letter before a space or newline."""
    result, start = [], 0
    while len(text) - start > 2 * size and (cut := CUT.search(text, start + size)):
        result.append(text[start : cut.end()])
        start = cut.end()
    result.append(text[start:])
    return result


class Encoder:
    """Encodes batches of documents with their marks around them, each as `TextCoder` would; marks: None takes those of the bare tokenizer."""

    def __init__(self, tokenizer: Tokenizer, marks: Marks | None = None) -> None:
        self.marks = marks or marks_of(tokenizer)
        self.tokenizer = reader_of(tokenizer, [*self.marks.start_ids, *self.marks.end_ids])
        self.before, self.after = self.marks.start_ids, [] if self.marks.end is None else [self.marks.end]
        self.table, self.cuts = byte_table(tokenizer), can_cut(tokenizer)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids (uint32) of each document, the mark that starts it first. Raises UserError where the tokenizer has none for a part of one."""
        if self.table is not None:
            before, after = np.array(self.before, dtype=np.uint32), np.array(self.after, dtype=np.uint32)
            return [np.concatenate([before, self.table[np.frombuffer(text.encode(), np.uint8)], after]) for text in texts]
        parts = [pieces(text) if self.cuts else [text] for text in texts]
        with no_unknown_token():
            encodings = iter(self.tokenizer.encode_batch_fast([p for part in parts for p in part], add_special_tokens=False))
        result = []
        for part in parts:
            ids = list(self.before)
            for _ in part:
                ids += next(encodings).ids
            ids += self.after
            result.append(np.array(ids, dtype=np.uint32))
        return result

    def stream(self, groups: Iterator[list[str]]) -> Iterator[tuple[list[str], list[np.ndarray]]]:
        """(texts, ids) of each group in order; up to three groups are under way at a time."""
        with ThreadPoolExecutor(2, "encode") as pool:
            waiting: deque[tuple[list[str], Future[list[np.ndarray]]]] = deque()
            try:
                for group in groups:
                    waiting.append((group, pool.submit(self.encode, group)))
                    if len(waiting) == 3:
                        texts, future = waiting.popleft()
                        yield texts, future.result()
                while waiting:
                    texts, future = waiting.popleft()
                    yield texts, future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def batches(texts: Iterator[str], skip: int = 0) -> Iterator[list[str]]:
    """Groups of documents for one parallel call of the tokenizer, read ahead on a thread; the first `skip` are passed over."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=3)
    stop = threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def read() -> None:
        group: list[str] = []
        size = 0
        try:
            for number, text in enumerate(texts):
                if stop.is_set():
                    return
                if number < skip:
                    continue
                group.append(text)
                size += len(text)
                if len(group) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
                    put(group)
                    group, size = [], 0
            if group:
                put(group)
            put(None)
        except BaseException as error:  # handed to the consumer
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(timeout=5.0)
