"""What the items of a suite are about: a model, the text that it reads, and the lengths and numbers that follow from its training length.

Legend: R rows, L tokens of a row; T tokens of a training sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from evals.adapters.base import Adapter, ItemError
from evals.inputs.common_text import CommonText
from evals.inputs.texts import Text, constant_rows, random_rows, tokenised
from evals.measures.position import unlearnt, windows


@dataclass
class Settings:
    """What a user can set, lengths in tokens; None: derived from the model's training length T."""

    suite: str = "quick"
    train_length: int | None = None  # T
    max_length: int | None = None  # of a position curve
    lengths: list[int] = field(default_factory=list)  # of retrieval prompts, or of sequences of a generated task
    depths: int = 5  # places of a key in a prompt
    samples: int | None = None  # prompts at each length and depth
    sequences: int | None = None  # of a generated task, at each length
    rows: int | None = None  # sequences of a position curve, and documents
    chunk: int = 2048  # tokens fed at once
    batch: int = 8  # sequences fed at once
    seed: int = 0
    cures: str = "default"  # default | none | comma-separated, see evals/cures/options.py
    tasks: str = ""  # of the harness, with commas between them; empty: evals.measures.harness.TASKS
    data: str | None = None  # token shards whose held-out split is the text
    text: str | None = None  # file that is the text
    add_bos_token: str = "auto"  # of the harness: true, false, or auto: as the tokenizer says
    only: str = ""  # runs only items whose name contains this (or one of several, with commas between them)
    redo: bool = False  # measures again what is there already


class Subject:
    """A model with its text, and what the settings leave to be derived from its training length."""

    def __init__(
        self,
        adapter: Adapter,
        settings: Settings,
        run: dict[str, Any] | None = None,
        common: CommonText | None = None,
        path: str | None = None,
    ) -> None:
        """run: what the checkpoint's run.json says; common: the text of all models of the evaluation; path: what the model is called there."""
        self.adapter, self.settings = adapter, settings
        self.path = path or adapter.folder
        facts = None if run is None else {self.path: {"run": run}}  # else those of its folder
        self.common = common or CommonText([self.path], settings.data, settings.text, facts)
        data = (run or {}).get("data") or {}
        self.task: dict[str, Any] | None = data.get("task") if data.get("reader") == "synthetic" else None  # that the model was trained on
        self.quick = settings.suite == "quick"
        self.T = settings.train_length or min(adapter.train_length or 512, 8192)
        limit = adapter.position_limit or 1 << 62
        self.max_length = settings.max_length or min((4 if self.quick else 64) * self.T, limit)
        self.lengths = settings.lengths or [n for n in self._powers(4 * self.T if self.quick else 16 * self.T) if n <= limit]
        self.samples = settings.samples or (5 if self.quick else 20)
        self.rows = settings.rows or (4 if self.quick else 16)
        self._unlearnt: str | None = None
        self._text: Text | None = None

    def _powers(self, most: int) -> list[int]:
        """Lengths that double from a quarter of T (256 at least) to `most`."""
        low = max(256, self.T // 4)
        return [low * 2**k for k in range(40) if low * 2**k <= max(low, most)]

    @property
    def text(self) -> Text:
        """The common text in the model's tokens, read when it is first needed. Raises ItemError where there is no tokenizer."""
        if self._text is None:
            self._text = tokenised(self.common.corpus, self.adapter)
        return self._text

    def about_text(self) -> dict[str, Any]:
        """What a result on prose says of its text: which it is, and whether the model was trained on it."""
        return {"text": self.common.corpus.to_dict(), "seen": self.common.seen_by(self.path)}

    def text_hash(self) -> str:
        """SHA-256 of the common text; 'none' for a model that cannot read it."""
        if self.adapter.coder is None and self.common.text is not None:
            return "none"  # its items are going to say that there is no tokenizer
        return self.common.corpus.sha256

    def unlearnt(self) -> str:
        """Why the model gets no verdict: it is no better than a unigram of the text, or it cannot be told; '' for one that has learnt."""
        if self._unlearnt is None:
            try:
                rows, length = self.text.fitting(4, min(self.T, 1024) + 1)
                ids_RL = self.text.rows(rows, length, self.settings.seed)
            except ItemError:
                self._unlearnt = "there is no text to tell whether the model has learnt anything"
                return self._unlearnt
            nats: list[float] = []
            scored: list[int] = []

            def each(first: int, nll: torch.Tensor, state: Any) -> None:
                nats.append(float(nll.double().sum()))
                scored.append(nll.numel())

            self.adapter.stream(torch.from_numpy(ids_RL), self.settings.chunk, each)
            mean = sum(nats) / sum(scored)
            self._unlearnt = unlearnt(mean, ids_RL[:, 1:], self.text.ids, self.adapter.vocab_size)
        return self._unlearnt

    def rows_of(self, prompt: str, rows: int, length: int) -> np.ndarray:
        """(rows, length) ids of random or constant tokens; of prose as many and as long as the text gives, at most that."""
        if prompt == "constant":
            return constant_rows(self.adapter, rows, length)
        if prompt == "random":
            return random_rows(self.adapter, rows, length, self.settings.seed)
        return self.text.rows(*self.text.fitting(rows, length), self.settings.seed)

    def reach(self, prompt: str, ids_RL: np.ndarray, rows: int, length: int) -> dict[str, Any]:
        """What a result on `rows_of` says of its rows: the text, how far it reaches where it does not give all that was asked for, and what was lost."""
        if prompt != "prose":
            return {}
        about: dict[str, Any] = {"asked_length": length, "asked_rows": rows, **self.about_text()}
        notes = [self.text.note] if self.text.note else []
        if ids_RL.shape[1] < length:
            notes.insert(0, f"the text reaches {ids_RL.shape[1]:,} tokens of the {length:,} asked for")
        elif ids_RL.shape[0] < rows:
            notes.insert(0, f"the text gives {ids_RL.shape[0]} row(s) of the {rows} asked for")
        return {**about, "note": "; ".join(notes)} if notes else about

    def in_windows(self, prompt: str, ids_RL: np.ndarray) -> dict[str, Any] | None:
        """The same rows in windows of T tokens, which the long ones are judged against; None for constant tokens and for rows within T."""
        if prompt == "constant" or ids_RL.shape[1] - 1 <= self.T:
            return None
        batch = max(self.settings.batch, min(256, 8192 // self.T))
        return windows(self.adapter, ids_RL, self.T, chunk=self.settings.chunk, batch=batch, seed=self.settings.seed)

    def recurrent(self) -> bool:
        """Whether the model has a state to look at; one that cannot be asked counts, and is left to fail in its items."""
        try:
            state = self.adapter.advance(torch.zeros(1, 2, dtype=torch.long), self.adapter.start(1))
            return bool(self.adapter.layer_states(state))
        except Exception:
            return True
