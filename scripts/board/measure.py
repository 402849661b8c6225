"""What is read off a trained cell: held-out bits per byte, loss by position far beyond the training length, a repeated passage, effective memory.

Each figure is of held-out documents, read in windows or rows that follow from the data alone, so all models see the same tokens.
Legend: R rows, T tokens of a training window.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.shards import ShardSet
from evals.adapters.base import ItemError
from evals.adapters.own import OwnAdapter
from evals.measures.position import collapse, position_curve, unlearnt_rows, windows
from evals.measures.states import effective_remembrance
from evals.measures.statistics import bootstrap_ratio
from models.lm import LanguageModel
from scripts.studies.graphed import GraphedStep

BEYOND = 64  # training lengths that the loss by position reaches
PER_DOCUMENT = 2  # rows of that length from a document at most, so that no document weighs too much
NEAR = 0.1  # total variation distance below which a shorter context counts as as good


def windows_of(shards: ShardSet, T: int, most_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(inputs (W, T), labels (W, T) with -100 behind a document's end, document of each window, bytes of each document): every token of the held-out
    documents behind its first is a label once. most_tokens: of the
    first documents only, the last of them cut, its bytes by its share of tokens."""
    inputs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    owner: list[int] = []
    sizes: list[float] = []
    taken = 0
    for i in range(shards.n_documents):
        ids, size = shards.document(i)
        room = len(ids) if most_tokens is None else most_tokens - taken
        taken, share = taken + len(ids), min(1.0, room / len(ids))
        if room < 2:
            break
        ids = ids[:room].astype(np.int64)
        count = -(-(len(ids) - 1) // T)
        if not count:
            continue
        padded = np.full(count * T + 1, -100, np.int64)
        padded[: len(ids)] = ids
        rows = padded[:-1].reshape(count, T)
        inputs.append(np.where(rows < 0, shards.eot_id, rows))
        labels.append(padded[1:].reshape(count, T))
        owner += [len(sizes)] * count
        sizes.append(share * size)
    return np.concatenate(inputs), np.concatenate(labels), np.array(owner), np.array(sizes, np.float64)


@functools.lru_cache(maxsize=2)
def _windows(data: str, T: int, most_tokens: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`windows_of` of the held-out documents at `data`; the cells of a process share them."""
    return windows_of(ShardSet(data, "valid"), T, most_tokens)


@torch.no_grad()
def held_out(
    model: LanguageModel, shards: ShardSet, T: int, precision: str, most_tokens: int | None = None, batch: int = 64
) -> dict[str, Any]:
    """Bits per byte of the held-out documents in windows of T tokens from an empty state, as in training; 95 % interval by a bootstrap over documents."""
    device, training = model.embedding.weight.device, model.training
    inputs, labels, owner, sizes = _windows(str(shards.directory), T, most_tokens)
    nats, tokens = np.zeros(len(sizes)), np.zeros(len(sizes))
    sums = []

    def scored(ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and device.type == "cuda"):
            output = model(ids_BT, labels=labels_BT, reduction="none")
        return (torch.where(labels_BT != -100, output.token_nll.double(), 0.0).sum(1),)

    model.eval()
    ids, wanted = (torch.from_numpy(part).to(device) for part in (inputs, labels))
    # As written a pass takes longer to launch than to run; its graph runs the same kernels on the same shapes.
    step = GraphedStep(scored, device)
    for a in range(0, len(inputs), batch):
        whole = a + batch <= len(inputs)
        (sum_B,) = (step if whole else scored)(ids[a : a + batch], wanted[a : a + batch])
        sums.append(sum_B.clone())
    model.train(training)
    np.add.at(nats, owner, torch.cat(sums).cpu().numpy())
    np.add.at(tokens, owner, (labels != -100).sum(1))
    low, high = (x / math.log(2) for x in bootstrap_ratio(nats, sizes))
    return {
        "bits_per_byte": float(nats.sum() / sizes.sum() / math.log(2)),
        "low": low if low == low else None,  # no interval of one document
        "high": high if high == high else None,
        "nats_per_token": float(nats.sum() / tokens.sum()),
        "documents": len(sizes),
        "tokens": int(tokens.sum()),
        "bytes": int(sizes.sum()),
    }


def long_rows(shards: ShardSet, length: int, most: int) -> np.ndarray:
    """(R, length + 1) ids from held-out documents that are so long, at most `most` rows and PER_DOCUMENT of a document. Raises ItemError if none is."""
    rows: list[np.ndarray] = []
    for i in range(shards.n_documents):
        ids, _ = shards.document(i)
        for k in range(min(PER_DOCUMENT, (len(ids) - 1) // length)):
            rows.append(ids[k * length : (k + 1) * length + 1].astype(np.int64))
    if not rows:
        raise ItemError(f"No held-out document has {length + 1:,} tokens.")
    return np.stack(rows[:most])


def by_position(adapter: OwnAdapter, shards: ShardSet, T: int, rows: int) -> dict[str, Any]:
    """Loss by position up to BEYOND T, and whether and where it turns up beside the same tokens in windows of T."""
    ids = long_rows(shards, BEYOND * T, rows)
    curve = position_curve(adapter, ids, chunk=4 * T, batch=len(ids), through=T, per_octave=1)
    same = windows(adapter, ids, T, batch=128)
    text = np.asarray(shards.read(0, min(shards.n_tokens, 2_000_000)))
    return {
        "collapse": collapse(curve["buckets"], T, same, unlearnt_rows(same, ids, text, adapter.vocab_size)),
        "buckets": curve["buckets"],
        "windows": same["by_place"],
        "rows": len(ids),
    }


def repeated(adapter: OwnAdapter, shards: ShardSet, T: int, rows: int) -> dict[str, Any]:
    """Nats per token of a passage of T/4 tokens at first and when it comes again behind a gap of other text, by the length of the gap: within the
    training length (0, T/2) and beyond it (4 T). copied: the share of the first reading's loss that is saved."""
    n = T // 4
    text = np.asarray(shards.read(0, shards.n_tokens)).astype(np.int64)
    starts = np.linspace(0, len(text) - 8 * T, rows).astype(int)
    result = []
    for gap in (0, T // 2, 4 * T):
        ids = np.stack([np.concatenate([[shards.eot_id], text[s : s + n], text[s + n : s + n + gap], text[s : s + n]]) for s in starts])
        scored: list[torch.Tensor] = []

        def each(first: int, nll: torch.Tensor, state: Any, scored: list[torch.Tensor] = scored) -> None:
            scored.append(nll.double().cpu())

        adapter.stream(torch.from_numpy(ids), 4 * T, each)
        nll = torch.cat(scored, 1)
        first, again = nll[:, :n].mean(1), nll[:, n + gap :].mean(1)
        saved = (first - again).numpy()
        low, high = bootstrap_ratio(saved, np.ones(len(saved)))
        row = {
            "gap": gap,
            "first": float(first.mean()),
            "again": float(again.mean()),
            "saved": float(saved.mean()),
            "low": low,
            "high": high,
        }
        result.append(row | {"copied": float(saved.mean() / first.mean())})
    return {"passage": n, "rows": rows, "gaps": result}


def memory(adapter: OwnAdapter, shards: ShardSet, T: int, rows: int) -> dict[str, Any]:
    """Effective memory: the fewest last tokens after which the next-token distribution lies within NEAR (total variation, mean over rows) of the one
    after all of them, for T tokens and for 8 T."""
    result: dict[str, Any] = {}
    for name, length in (("within", T), ("beyond", 8 * T)):
        text = np.asarray(shards.read(0, shards.n_tokens)).astype(np.int64)
        starts = np.linspace(0, len(text) - length - 1, rows).astype(int)
        ids = np.stack([text[s : s + length] for s in starts])
        left = [k for k in (2**i for i in range(2, 20)) if k < length]
        found = effective_remembrance(adapter, ids, [length - k for k in left], chunk=4 * T)
        curve = [{"context": k, **{key: row[key] for key in ("distance", "low", "high")}} for k, row in zip(left, found["curve"])]
        enough = [row["context"] for row in curve if row["distance"] <= NEAR]
        result[name] = {"length": length, "tokens": min(enough, default=length), "curve": curve}
    return result


def everything(model: LanguageModel, data: str | Path, settings: dict[str, Any], full: bool) -> dict[str, Any]:
    """All that is read off a model trained on text; full: more than the held-out loss. What cannot be measured says why in its place."""
    shards, T, precision = ShardSet(data, "valid"), settings["T"], settings["precision"]
    result: dict[str, Any] = {"held_out": held_out(model, shards, T, precision, settings["held_out_tokens"])}
    if not full:
        return result
    on_gpu = model.embedding.weight.device.type == "cuda"
    adapter = OwnAdapter(model, None, settings["row"], "", precision if on_gpu else "fp32")
    rows = settings["measured_rows"]
    for name, measure, count in (("position", by_position, rows), ("repeated", repeated, 8 * rows), ("memory", memory, 4 * rows)):
        try:
            with torch.no_grad():
                result[name] = measure(adapter, shards, T, count)
        except (ItemError, torch.OutOfMemoryError) as error:
            result[name] = {"failed": str(error).splitlines()[0]}
    model.train()
    return result
