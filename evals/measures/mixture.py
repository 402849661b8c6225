"""Held-out loss of a mixture: of every source by itself, and of all by the weights they are trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.shards import ShardSet, open_held_out
from evals.measures.perplexity import Perplexity


@dataclass
class HeldOut:
    """A source that can be evaluated, its training and its held-out split. share: of the weights of all such sources, 0 to 1; name: short, unique."""

    name: str
    train: ShardSet
    shards: ShardSet
    share: float

    def budget(self, tokens: int, length: int) -> int:
        """How many of `tokens` are scored of this source: its share, and at least a row of `length`."""
        return max(min(tokens, length), round(tokens * self.share))


def held_out_sources(sources: Sequence[tuple[ShardSet, float]]) -> tuple[list[HeldOut], list[str]]:
    """(sources with held-out documents, folders without). Raises ValueError when what is there cannot be read."""
    opened = [(train, weight, open_held_out(train.directory)) for train, weight in sources]
    there = [(train, weight, shards) for train, weight, shards in opened if shards is not None]
    total = sum(weight for _, weight, _ in there)
    names = names_of([str(train.directory) for train, _, _ in there])
    shares = [weight / total if total else 1 / len(there) for _, weight, _ in there]
    return [HeldOut(n, t, s, share) for n, (t, _, s), share in zip(names, there, shares)], [
        str(t.directory) for t, _, s in opened if s is None
    ]


def names_of(folders: list[str]) -> list[str]:
    """Last part of each path, or the whole where two have the same."""
    short = [Path(folder).name for folder in folders]
    return [name if short.count(name) == 1 and name else folder for name, folder in zip(short, folders)]


def combined(parts: Sequence[tuple[Perplexity, float]]) -> Perplexity:
    """The sums over all (source, share) pairs, scaled so that each source counts by its share however many tokens were scored of it. A
    single source's sums are returned unchanged. Sources of which nothing was scored leave their share to the others."""
    parts = [pair for pair in parts if pair[0].tokens] or parts[:1]
    if len(parts) == 1:
        return parts[0][0]
    tokens, length = sum(part.tokens for part, _ in parts), max(part.length for part, _ in parts)
    total, whole = Perplexity(tokens=tokens, length=length), sum(share for _, share in parts)
    for part, share in parts:
        factor = share / whole * total.tokens / part.tokens
        total.nll_nats += factor * part.nll_nats
        total.bytes += factor * part.bytes  # type: ignore[assignment]
        for low, (nats, count) in part.by_position.items():
            entry = total.by_position.setdefault(low, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + factor * nats, entry[1] + factor * count
    total.bytes = round(total.bytes)
    return total


def of_report(report: dict[str, Any]) -> Perplexity:
    """The sums behind a report of one source."""
    by_position = {row["from"]: [row["nats_per_token"] * row["tokens"], float(row["tokens"])] for row in report["by_position"]}
    length = max((row["to"] + 1 for row in report["by_position"]), default=0)
    return Perplexity(report["nats_per_token"] * report["tokens"], report["tokens"], report["bytes"], by_position, length)


def figures(part: Perplexity, share: float) -> dict[str, float]:
    """What a report says of one source: its share, 0 to 1, and its figures."""
    return {
        "share": share,
        "bits_per_byte": part.bits_per_byte,
        "perplexity": part.perplexity,
        "nats_per_token": part.nats_per_token,
        "tokens": part.tokens,
    }


def by_source(sources: dict[str, dict[str, float]]) -> str:
    """The figures of all sources in one line, for the log."""
    return "by source: " + ", ".join(
        f"{name} {one['bits_per_byte']:.4f} bits per byte ({one['share']:.0%})" for name, one in sources.items()
    )
