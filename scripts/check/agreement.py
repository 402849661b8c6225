"""Our figures against those of transformers itself, for one model folder: losses, passkey scoring, and chunks against the whole.

    python -m scripts.check.agreement checkpoint=DIR [gguf=FILE-NAME] [text=FILE] [rows=4] [length=512] [samples=200] [prompt=160] [long=65536] [device=auto] [out=FILE]

1. perplexity: a plain loop (one row, whole, cross entropy in fp64) against the runner's position curve in chunks; must agree to 1e-4 relative.
2. passkey: `samples` prompts of `prompt` tokens; the teacher-forced score against what `generate(do_sample=False)` writes, for the true key, for
   the text that was written (which must be a hit), and for that text with one token changed (a miss). All must be equal.
3. long: `long` tokens in chunks of 4,096 with carried state against one call, if asked for; the losses must agree to 1e-3 and their mean to 1e-4.

fp32 throughout. Prints one line each, writes JSON, and ends with status 1 where something disagrees.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data.files import write_json
from evals.adapters.base import ItemError
from evals.adapters.hf import HFAdapter
from evals.adapters.load import load_adapter
from evals.inputs.tasks import Task
from evals.inputs.texts import open_text
from evals.measures.position import position_curve
from training.config.arguments import parse_arguments, program
from training.errors import UserError
from training.watch.metrics import environment

ROOT = Path(__file__).resolve().parents[2]

DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "gguf": None,
    "trust_remote_code": False,
    "text": None,
    "rows": 4,
    "length": 512,
    "samples": 200,
    "prompt": 160,
    "long": 0,
    "seed": 0,
    "batch": 10,
    "device": "auto",
    "out": "runs/agreement.json",
}
NEW = 6  # tokens written after a passkey prompt


def perplexity(adapter: HFAdapter, rows_RT: np.ndarray) -> dict[str, Any]:
    nats, ids = 0.0, torch.from_numpy(rows_RT).to(adapter.device)
    with torch.no_grad():
        for row in ids:
            logits = adapter.model(row[None, :-1]).logits[0].double()
            nats += float(F.cross_entropy(logits, row[1:], reduction="sum"))
    plain = nats / (ids.numel() - len(ids))
    ours = position_curve(adapter, rows_RT, chunk=100, batch=len(rows_RT))["nats_per_token"]
    relative = abs(float(np.exp(ours - plain)) - 1)
    return {
        "plain": plain,
        "ours": ours,
        "relative_difference_of_perplexity": relative,
        "tokens": ids.numel() - len(ids),
        "agrees": relative < 1e-4,
    }


def passkey(adapter: HFAdapter, samples: int, length: int, batch: int, seed: int) -> dict[str, Any]:
    coder, rng = adapter.need_coder(), np.random.default_rng(seed)
    samples_drawn = [Task("passkey").sample(coder, length, (i + 0.5) / samples, i, seed) for i in range(samples)]
    model: Any = adapter.model
    equal, right, hits = {"key": 0, "written": 0, "changed": 0}, 0, 0
    for a in range(0, samples, batch):
        group = samples_drawn[a : a + batch]
        prompt = torch.tensor([s.prompt for s in group])
        device_prompt = prompt.to(adapter.device)
        written = model.generate(
            device_prompt,
            attention_mask=torch.ones_like(device_prompt),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[:, length:].cpu()
        width = max(len(s.answer) for s in group)
        key = torch.tensor([s.answer + [-100] * (width - len(s.answer)) for s in group])
        changed = written.clone()
        place = torch.from_numpy(rng.integers(0, NEW, len(group)))
        at = (torch.arange(len(group)), place)
        changed[at] = (changed[at] + 1) % adapter.vocab_size
        for name, answer in (("key", key), ("written", written), ("changed", changed)):
            ours = adapter.hits(prompt, answer, 97)
            n = answer.shape[1]
            theirs = ((written[:, :n] == answer) | (answer == -100)).all(1)
            equal[name] += int((ours == theirs).sum())
            right += int(theirs.sum()) if name == "key" else 0
            hits += int(ours.sum()) if name == "key" else 0
    return {
        "samples": samples,
        "prompt": length,
        "equal": equal,
        "right_by_generate": right,
        "right_by_us": hits,
        "agrees": min(equal.values()) == samples,
    }


def long(adapter: HFAdapter, row_1T: np.ndarray) -> dict[str, Any]:
    pieces: list[torch.Tensor] = []
    ids, start = torch.from_numpy(row_1T), time.perf_counter()
    adapter.stream(ids, 4096, lambda first, nll, state: pieces.append(nll.cpu()))
    chunked, seconds = torch.cat(pieces, 1), time.perf_counter() - start
    whole, _ = adapter.losses(ids[:, :-1], ids[:, 1:], adapter.start(1))
    difference = (chunked - whole.cpu()).abs()
    mean = float(abs(chunked.double().mean() - whole.cpu().double().mean()))
    return {
        "tokens": chunked.shape[1],
        "largest_difference": float(difference.max()),
        "difference_of_means": mean,
        "seconds_in_chunks": seconds,
        "agrees": float(difference.max()) < 1e-3 and mean < 1e-4,
    }


def main(words: list[str]) -> int:
    """What the command line asks for; 1 where something disagrees. Raises UserError."""
    values = parse_arguments(words, DEFAULTS, lambda v: [] if v["checkpoint"] else ["Say which model: checkpoint=DIR."])
    device = "cuda" if values["device"] in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    adapter = load_adapter(values["checkpoint"], torch.device(device), "fp32", values["gguf"], values["trust_remote_code"])
    if not isinstance(adapter, HFAdapter):
        raise UserError(f"{values['checkpoint']} is a checkpoint of ours; export it first, so that transformers can be asked as well.")
    text = open_text(adapter, None, values["text"])
    try:
        rows, whole = (
            text.rows(values["rows"], values["length"] + 1, values["seed"]),
            text.rows(1, values["long"] + 1 if values["long"] else 2, values["seed"]),
        )
    except ItemError as error:
        raise UserError(str(error)) from error
    result: dict[str, Any] = {"arguments": values, "model": adapter.describe(), "environment": environment(torch.device(device))}
    parts = {
        "perplexity": lambda: perplexity(adapter, rows),
        "passkey": lambda: passkey(adapter, values["samples"], values["prompt"], values["batch"], values["seed"]),
        "long": lambda: long(adapter, whole),
    }
    for name, run in parts.items():
        if name == "long" and not values["long"]:
            continue
        result[name] = run()
        print(f"{name}: {result[name]}", flush=True)
        write_json(Path(values["out"]), result)
    return 0 if all(result[name]["agrees"] for name in parts if name in result) else 1


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
