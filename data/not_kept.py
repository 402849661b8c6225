"""What of a text its tokens do not hold: the line about it that data.prepare prints and keeps in meta.json."""

from __future__ import annotations

from tokenizers import Tokenizer

from data.byte_counts import bytes_of
from data.encode import can_cut
from data.tokenizer import Marks, byte_table, has_every_byte, unknown_id
from data.writer import ShardWriter

REWRITTEN = 0.001  # share of a text's bytes from which it is said that its tokens stand for more or fewer


def not_kept(writer: ShardWriter, tokenizer: Tokenizer, marks: Marks) -> list[str]:
    """No line or one, of what has been written: text that was lost, or else was changed."""
    return _lost(writer, tokenizer, marks) or _changed(writer, tokenizer, marks)


def _lost(writer: ShardWriter, tokenizer: Tokenizer, marks: Marks) -> list[str]:
    """A line about text that has become the tokenizer's unknown token: it is gone, and a model is praised for predicting that."""
    unknown = unknown_id(tokenizer, [*marks.start_ids, *marks.end_ids])
    if unknown is None or not (lost := writer.occurrences(unknown)):
        return []
    total = sum(split.tokens for split in writer.splits.values())
    return [
        f"lost, {lost:,} of {total:,} tokens ({lost / total:.1%}) are {tokenizer.id_to_token(unknown)!r}, as the tokenizer has none for their text: bits "
        "per byte look better than they are, and are not comparable with those of other tokenizers; bpe:SIZE and bytes lose nothing"
    ]


def _changed(writer: ShardWriter, tokenizer: Tokenizer, marks: Marks) -> list[str]:
    """A line about tokens that stand for more or fewer bytes than the text has, by REWRITTEN or more: some of it is left out or written otherwise."""
    if byte_table(tokenizer) is not None or can_cut(tokenizer) and has_every_byte(tokenizer):
        return []
    ends, text = [*marks.start_ids, *marks.end_ids], sum(split.bytes for split in writer.splits.values())
    told = sum(bytes_of(tokenizer, block, ends) for block in writer.blocks())
    if not text or abs(told / text - 1) < REWRITTEN:
        return []
    return [
        f"changed, {text:,} bytes of text have become tokens that stand for {told:,}, as the tokenizer leaves some out or writes it otherwise: bits per"
        " byte divide by the latter, and are not comparable with those of other tokenizers; bpe:SIZE and bytes change nothing"
    ]
