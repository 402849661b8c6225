"""The one text that all models of an evaluation are measured on, and what is known of each model and that text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from evals.inputs.seen import Seen, facts_of_run, folders_of, seen
from evals.inputs.texts import Corpus, corpus_of_shards, open_corpus
from training.errors import UserError

DEFAULT_LENGTH, LONGEST = 512, 8192  # training length where a model does not say its own, and the most that is believed of a config
CHARACTERS = 3  # of a document for each token that the model with the shortest training length is to read of it


class CommonText:
    """text or data as the person gives them; else the held-out split of the first of the runs that no other model was trained on, else the
    bundled books. Nothing is read before it is needed."""

    def __init__(
        self, paths: list[str], data: str | None = None, text: str | None = None, facts: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """facts: by path, where they are known already."""
        self.facts = {path: facts_of_run(path) if facts is None else facts.get(path, {}) for path in paths}
        self.data, self.text = data, text
        self._corpus: Corpus | None = None
        self._known: dict[tuple[str, str], Seen] = {}
        self._shares: dict[str, dict[str, float]] = {}

    def characters(self, train_length: int | None, max_length: int | None) -> int:
        """How much of a document all models read: about four training lengths of the one with the shortest, at most `max_length` tokens."""
        shortest = train_length or min((train_length_of(path, facts) for path, facts in self.facts.items()), default=DEFAULT_LENGTH)
        return CHARACTERS * min(4 * shortest, max_length or 4 * shortest)

    @property
    def corpus(self) -> Corpus:
        """The text, chosen and read when it is first asked for. Raises UserError where it cannot be read."""
        if self._corpus is None:
            self._corpus = open_corpus(self.data, self.text) if self.data or self.text else self._choose()
            if self._corpus.note:
                print(f"text: {self._corpus.name} ({self._corpus.note})", flush=True)
        return self._corpus

    def _choose(self) -> Corpus:
        opened: list[Corpus] = []
        splits = [",".join(folders_of(facts)) for facts in self.facts.values() if not _task(facts)]
        for folders in dict.fromkeys(f for f in splits if f and all(Path(part).is_dir() for part in f.split(","))):
            try:
                corpus = corpus_of_shards(folders)
            except UserError as error:
                print(f"{folders} is not evaluated on: {error}", file=sys.stderr, flush=True)
                continue
            if not corpus.documents:
                continue
            opened.append(corpus)
            if not any(self._of(path, corpus).status.endswith("trained on") for path in self.facts):
                break
        else:
            return opened[0] if opened else open_corpus(None, None)
        return opened[-1]

    def _of(self, path: str, corpus: Corpus) -> Seen:
        key = (path, corpus.sha256)
        if key not in self._known:
            shares = self._shares.setdefault(corpus.sha256, {})  # models trained on the same shards share one search
            self._known[key] = seen(corpus.documents, self.facts.get(path, {}), shares)
        return self._known[key]

    def seen_by(self, path: str) -> dict[str, Any]:
        """Whether the model at `path` was trained on the text."""
        return self._of(path, self.corpus).to_dict()


def train_length_of(path: str, facts: dict[str, Any]) -> int:
    """Tokens of a training sequence of a model: what its run says, else the positions its config has, else 512."""
    length = ((facts.get("run") or {}).get("train") or {}).get("seq_len")
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8")) if length is None else {}
        length = length or config.get("max_position_embeddings") or config.get("n_positions")
    except (OSError, ValueError, AttributeError):
        pass
    return min(length, LONGEST) if isinstance(length, int) and length > 0 else DEFAULT_LENGTH


def _task(facts: dict[str, Any]) -> bool:
    """Whether a run was trained on a generated task, which is no text."""
    return ((facts.get("run") or {}).get("data") or {}).get("reader") == "synthetic"
