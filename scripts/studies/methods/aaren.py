"""Aaren: what a new token still changes after much text, the verdict of the evaluations on small models far beyond their training length, and cost.

python -m scripts.studies.methods.aaren          # a few minutes on one core; docs/results/methods/aaren.json
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from evals.adapters.own import OwnAdapter
from evals.measures.position import collapse, position_curve, windows
from evals.measures.states import state_curve
from models import mixers
from scripts.studies.methods.common import arguments, cost, demo_bytes, model_of, text_batches, train, write

ARMS: dict[str, dict[str, Any]] = {
    "aaren": {"type": "aaren", "n_heads": 4},
    "mingru": {"type": "rnn", "cell": "mingru", "n_heads": 4},
    "gated_deltanet": {"type": "delta", "n_heads": 4},
}


@torch.no_grad()
def latest_share(mapping: dict[str, Any], read: int) -> float:
    """How far a token moves the state after `read` tokens, relative to the size that states have, on noise with fresh weights."""
    torch.manual_seed(0)
    mixer: Any = mixers.build(mapping, 32, 0)
    mixer.init_weights(0.3, 0)
    _, before = mixer(torch.randn(4, read, 32), mixer.init_state(4))
    _, after = mixer(torch.randn(4, 1, 32), before)
    old, new = (list(mixer.named_memories(state).values())[-1] for state in (before, after))
    return float((new - old).norm() / old.norm())


def beyond(mapping: dict[str, Any], seed: int, T: int = 64, far: int = 64) -> dict[str, Any]:
    """A small byte model trained on rows of T, read `far` T tokens at a stretch: the evaluations' verdict, and what is left of the newest token."""
    train_bytes, held_out = demo_bytes()
    model = model_of(mapping, 256, layers=2, d_ff=-1, std=0.05)
    train(model, text_batches(train_bytes, T, 16, seed), 400, seed=seed)
    adapter = OwnAdapter(model, None, "study", "", "fp32")
    start = [s * len(held_out) // 4 for s in range(4)]
    rows = np.stack([held_out[a : a + far * T + 1] for a in start])
    with torch.no_grad():
        buckets = position_curve(adapter, rows, chunk=512, through=T)["buckets"]
        verdict = collapse(buckets, T, windows(adapter, rows, T))
        states = state_curve(adapter, rows[:2, : 16 * T], T, chunk=512)["summary"]
    return {k: verdict[k] for k in ("verdict", "level_inside", "delta_at_end", "delta_largest")} | {
        "states": states,
        "T": T,
        "length": far * T,
    }


def main() -> None:
    given = arguments(__doc__, "aaren", ("share", "beyond", "cost"))
    if "share" in given.wanted:
        lengths = (16, 64, 256, 1024, 4096)
        shares = {name: {n: round(latest_share(m, n), 5) for n in lengths} for name, m in ARMS.items()}
        write(given.out, newest_token={"what": "change of the state by a token after so many, relative", "shares": shares})
        print(shares)
    if "beyond" in given.wanted:
        found = {name: [beyond(m, seed) for seed in range(given.seeds)] for name, m in ARMS.items()}
        write(given.out, beyond=found)
        print(
            {name: [(r["verdict"], round(r["level_inside"], 3), round(r["delta_at_end"], 3)) for r in rows] for name, rows in found.items()}
        )
    if "cost" in given.wanted:
        write(given.out, cost=cost(ARMS["aaren"]))


if __name__ == "__main__":
    main()
