"""JRT-RNN: whether it can be read from a state if two sets are disjoint, by which of them comes first; and cost.

    python -m scripts.studies.methods.jrt            # a minute on one core; docs/results/methods/jrt.json

Nothing is trained: symbols are random codes, keys and queries are the codes, values as well, and a token's score is how much of its own code it reads.
The mixer's own sums are used, with 273 features. In one pass the tokens of the second set look for themselves in the state of the first. With a
prompt read twice those of the long set look for themselves in what the prompt's sums hold of the short one, wherever it stands.
"""

from __future__ import annotations

import torch

from models.mixers.jrt import twice_read
from scripts.studies.methods.common import arguments, cost, write

SHORT, LONG, F, SYMBOLS = 4, 64, 16, 256


def told_apart(twice: bool, short_first: bool, seed: int, rows: int = 400) -> float:
    """Chance that a row whose sets share a symbol scores higher than one whose sets are disjoint: the largest score of the tokens that look."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randn(SYMBOLS, F, generator=draw)
    codes = codes / codes.norm(dim=1, keepdim=True)
    order = torch.rand(rows, SYMBOLS, generator=draw).argsort(1)
    short, long, shared = order[:, :SHORT], order[:, SHORT : SHORT + LONG].clone(), torch.arange(rows) % 2 == 0
    long[shared, 5] = short[shared, 1]
    ids = torch.cat([short, long] if short_first else [long, short], 1)
    is_short = torch.cat(
        [torch.full_like(part, part is short, dtype=torch.bool) for part in ((short, long) if short_first else (long, short))], 1
    )
    x = codes[ids][:, None]  # (B, 1, T, F): one head
    scale = F**0.5 * 3.0  # so that a match weighs about 8 and other symbols about 1
    ones, zeros = torch.ones_like(x[..., :1]), torch.zeros_like(x)
    document, whole = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
    if twice:  # the causal sums hold nothing, the prompt's sums the short set
        short_only = is_short[:, None, :, None]
        k_e, v_e = torch.where(short_only, x, zeros), torch.where(short_only, x, zeros)
        y, _ = twice_read(scale * x, zeros, torch.cat([zeros, ones], -1), k_e, torch.cat([v_e, ones], -1), document, whole, None)
        looks = ~is_short
    else:
        first = torch.arange(ids.shape[1]) < (SHORT if short_first else LONG)
        held = first[None, None, :, None]
        k, v = torch.where(held, x, zeros), torch.where(held, x, zeros)
        y, _ = twice_read(scale * x, k, torch.cat([v, ones], -1), zeros, torch.cat([zeros, ones], -1), document, ~whole, None)
        looks = ~first.expand_as(ids)
    score = (y[:, 0] * x[:, 0]).sum(-1).masked_fill(~looks, float("-inf")).amax(1)
    return float((score[shared][:, None] > score[~shared]).float().mean())


def main() -> None:
    given = arguments(__doc__, "jrt")
    if "sets" in given.only or not given.only:
        found = {
            f"{'prompt read twice' if twice else 'one pass'}, {'short' if first else 'long'} set first": [
                round(told_apart(twice, first, seed), 4) for seed in range(given.seeds)
            ]
            for twice in (False, True)
            for first in (True, False)
        }
        what = "chance that rows whose sets share a symbol score higher than disjoint ones (0.5: not told apart), a number a seed"
        write(given.out, sets={"what": what, "short": SHORT, "long": LONG, "features": 1 + F + F * F, "found": found})
        print(found)
    if "cost" in given.only or not given.only:
        write(
            given.out, cost={name: cost({"type": "jrt", "n_heads": 4, "prompt": p}) for name, p in (("causal", 0), ("prompt of 128", 128))}
        )


if __name__ == "__main__":
    main()
