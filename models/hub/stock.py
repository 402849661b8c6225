"""A stock class of transformers: its config.json, and where the rows of our parameters lie in its tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

Part = tuple[str, int, int, int]  # a tensor there, the first row in it, the first row in ours, rows
Cut = tuple[str, list[Part]]  # pattern of our name, and the parts it is cut into


@dataclass
class Stock:
    """A stock class: its config.json and how our parameters read there."""

    architecture: str
    config: dict[str, Any]
    rules: list[tuple[str, str]]  # pattern of our name, name there
    cuts: list[Cut] = field(default_factory=list)  # of what is not one tensor here and there
    aliases: dict[str, str] = field(default_factory=dict)  # parts of names that files may have instead

    def name(self, ours: str) -> str:
        """The name of one of our parameters in the stock class; of one that is cut, of its first part."""
        return self.parts(ours, 0)[0][0]

    def parts(self, ours: str, rows: int) -> list[Part]:
        """Where the `rows` rows of one of our parameters lie."""
        for pattern, parts in self.cuts:
            if match := re.fullmatch(pattern, ours):
                return [(match.expand(name), *where) for name, *where in parts]  # type: ignore[misc]
        for pattern, replacement in self.rules:
            if re.fullmatch(pattern, ours):
                return [(re.sub(pattern, replacement, ours), 0, 0, rows)]
        raise KeyError(ours)

    def tensors(self, rows: dict[str, int]) -> dict[str, list[tuple[int, str, int, int]]]:
        """Each tensor there, in the order of ours (rows by name), as parts (its row, our name, our row, rows)."""
        tensors: dict[str, list[tuple[int, str, int, int]]] = {}
        for ours, count in rows.items():
            for theirs, at, first, n in self.parts(ours, count):
                tensors.setdefault(theirs, []).append((at, ours, first, n))
        return {theirs: sorted(parts) for theirs, parts in tensors.items()}

    def known_as(self, theirs: str) -> list[str]:
        """The names that a file may have for one of its tensors, the usual one first."""
        return [theirs, *(theirs.replace(usual, other) for usual, other in self.aliases.items() if usual in theirs)]


def rope_parameters(mixer: Any) -> dict[str, Any]:
    """The rotary positions of a config of attention as transformers' configs say them."""
    return {
        "rope_type": "default",
        "rope_theta": mixer.rope_theta,
        **{k: v for k, v in (mixer.rope_scaling or {}).items() if not _dynamic_length(mixer, k)},
    }


def _dynamic_length(mixer: Any, key: str) -> bool:
    """Whether the key of a scaling is what dynamic scaling reads as max_position_embeddings."""
    return (mixer.rope_scaling or {}).get("rope_type") == "dynamic" and key == "original_max_position_embeddings"


def positions(mixer: Any, wanted: int) -> int:
    """max_position_embeddings: `wanted`, but where rotary positions follow from it."""
    return (
        int(mixer.rope_scaling["original_max_position_embeddings"])
        if _dynamic_length(mixer, "original_max_position_embeddings")
        else wanted
    )
