"""Whether a checkpoint was trained on a text: passages of the text are looked for among the tokens of the shards that its run names.

    known = seen(corpus.documents, facts_of_run("runs/quickstart"))
    known.status                                                          # "held out", "trained on", "partly trained on" or "not known"

What a run was trained on is known by the folders and fingerprints of its shards (run.json and state.json of a checkpoint, everywhen.json of
an exported folder). Passages are tokenised as the shards are and compared by a hash of their ids, so nothing depends on how documents were
cut; of very large shards evenly spaced blocks are read. Where the shards are gone or changed, or the model is somebody else's, it is not known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import ShardSet
from training.errors import UserError

PROBES = 256  # passages looked for
PASSAGE = 80  # bytes of a passage, about: what two texts hardly share by chance
AROUND = 1000  # characters tokenised on either side of a passage's middle, so that its tokens are those of the whole text
BLOCK = 1 << 20  # tokens read at once
MOST = 200_000_000  # tokens read in all
FEW = 0.02  # share of passages that may be shared by chance (licences, formulas)
ODD = np.uint64(0x9E3779B97F4A7C15)  # multiplier of the hash; odd, so it has an inverse modulo 2^64


@dataclass(frozen=True)
class Seen:
    """status; share of the passages that occur in the training data (None where not known); why: one sentence."""

    status: str
    share: float | None
    why: str

    def to_dict(self) -> dict[str, Any]:
        """What a result says of it."""
        return asdict(self)


def facts_of_run(path: str | Path) -> dict[str, Any]:
    """{'run': ..., 'state': ...} of a run, a checkpoint, or a folder exported from one; {} for any other model."""
    folder = Path(path)
    try:
        if (folder / "everywhen.json").is_file():
            facts = json.loads((folder / "everywhen.json").read_text(encoding="utf-8"))
            return {key: facts[key] for key in ("run", "state") if isinstance(facts.get(key), dict)}
        from models.checkpoint import find

        folder = find(folder)
        return {
            key: json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
            for key in ("run", "state")
            if (folder / f"{key}.json").is_file()
        }
    except (OSError, ValueError, TypeError, UserError):
        return {}


def folders_of(facts: dict[str, Any]) -> list[str]:
    """The shard folders a run was trained on, in the order of their fingerprints."""
    path = ((facts.get("run") or {}).get("data") or {}).get("path")
    return [path] if isinstance(path, str) else [str(p) for p in path] if isinstance(path, (list, dict)) else []


def seen(documents: Sequence[str], facts: dict[str, Any], shares: dict[str, float] | None = None) -> Seen:
    """Whether a checkpoint with these `facts` (of `facts_of_run`) was trained on the documents. shares: a cache of `share_found` by the
    fingerprint of the shards, read and filled here."""
    folders, recorded = folders_of(facts), list((facts.get("state") or {}).get("fingerprint") or [])
    if not folders:
        return Seen("not known", None, "The folder does not say what the model was trained on.")
    if earlier := _starts_elsewhere(facts):
        before = facts_of_run(earlier)
        if not folders_of(before):
            return Seen("not known", None, f"The run began from {earlier}, and what that was trained on is not known.")
        first = seen(documents, before, shares)
        if first.status != "held out":
            return first
    share, unknown, shares = 0.0, "", {} if shares is None else shares
    for i, folder in enumerate(folders):
        try:
            shards = ShardSet(folder, "train")
        except ValueError:
            unknown = f"The training shards {folder} are not there."
            continue
        if i < len(recorded) and shards.fingerprint != recorded[i]:
            unknown = f"The shards {folder} are not those of the training any more."
            continue
        try:
            if shards.fingerprint not in shares:
                shares[shards.fingerprint] = share_found(documents, shards)
        except ValueError as error:  # cut or lost while they were read
            unknown = str(error)
            continue
        share = max(share, shares[shards.fingerprint])
    if share > FEW:
        part = min(99, round(100 * share))
        if share >= 1 - FEW:
            return Seen("trained on", share, "Its passages occur in the training data.")
        return Seen("partly trained on", share, f"About {part} % of its passages occur in the training data.")
    if unknown:
        return Seen("not known", None, unknown)
    return Seen("held out", share, "Its passages do not occur in the training data.")


def _starts_elsewhere(facts: dict[str, Any]) -> str:
    """The checkpoint or folder whose weights the run began with, or ''."""
    run = facts.get("run") or {}
    return str((run.get("train") or {}).get("start_from") or (run.get("model") or {}).get("init_from") or "")


def share_found(documents: Sequence[str], shards: ShardSet) -> float:
    """Share of up to 256 passages of the documents that occur among the tokens of `shards`; 0 where there is no passage that long."""
    width = int(np.clip(round(PASSAGE * shards.n_tokens / max(1, shards.n_bytes)), 8, PASSAGE))
    passages = _passages(documents, shards, width)
    if not len(passages):
        return 0.0
    blocks = range(0, max(1, shards.n_tokens - width + 1), BLOCK)
    step = -(-len(blocks) * BLOCK // MOST)
    chosen, occurs = blocks[::step], np.zeros(len(passages), bool)
    known = np.zeros(1 << 16, bool)
    known[(passages >> np.uint64(48)).astype(np.int64)] = True
    for start in chosen:
        tokens = shards.read(start, min(BLOCK + width - 1, shards.n_tokens - start))
        hashes = window_hashes(tokens, width)
        hits = np.unique(hashes[known[(hashes >> np.uint64(48)).astype(np.int64)]])
        occurs |= np.isin(passages, hits)
    return float(min(1.0, occurs.mean() * len(blocks) / len(chosen)))


def _passages(documents: Sequence[str], shards: ShardSet, width: int) -> np.ndarray:
    """Hashes (uint64, sorted, each once) of passages of `width` tokens, evenly from all of the documents."""
    coder = shards.coder()
    ends = np.cumsum([len(d) for d in documents])
    if not len(ends) or not ends[-1]:
        return np.zeros(0, np.uint64)
    hashes = []
    for place in np.linspace(0, ends[-1] - 1, PROBES).astype(int):
        i = int(np.searchsorted(ends, place, side="right"))
        middle = int(place - (ends[i - 1] if i else 0))
        first = max(0, middle - AROUND)
        try:
            ids = coder.encode(documents[i][first : middle + AROUND])
        except UserError:  # of letters that these shards have no tokens for, which therefore do not occur in them
            continue
        if len(ids) < width:
            continue
        at = (len(ids) - width) * (middle - first) // max(1, min(len(documents[i]), middle + AROUND) - first)
        hashes.append(window_hashes(np.array(ids[at : at + width]), width)[0])
    return np.unique(np.array(hashes, np.uint64))


def window_hashes(tokens: np.ndarray, width: int) -> np.ndarray:
    """Hash (uint64) of every window of `width` tokens: their polynomial in ODD modulo 2^64, by differences of running sums."""
    n = len(tokens)
    if n < width:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(n - 1, ODD)]), dtype=np.uint64)
        inverse = np.uint64(pow(int(ODD), -1, 1 << 64))
        back = np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(n - width, inverse)]), dtype=np.uint64)
        mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * powers, dtype=np.uint64)])
        hashes = (sums[width:] - sums[:-width]) * back
        return np.asarray(hashes ^ (hashes >> np.uint64(29)), dtype=np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
