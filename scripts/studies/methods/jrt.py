"""JRT-RNN: whether it can be read from a state if two sets are disjoint, by which of them comes first; and cost.

    python -m scripts.studies.methods.jrt            # a quarter of an hour on one core; docs/results/methods/jrt.json

    python -m scripts.studies.methods.jrt --only shared --device cuda       # minutes on a GPU, which plays its steps from graphs

sets: nothing is trained: symbols are random codes, keys and queries are the codes, values as well, and a token's score is how much of its own code it reads.
The mixer's own sums are used, with 273 features. In one pass the tokens of the second set look for themselves in the state of the first. With a
prompt read twice those of the long set look for themselves in what the prompt's sums hold of the short one, wherever it stands.

shared: two layers are trained to name the one symbol that a short and a long set share, behind both; half of the rows have the short one
first. The state has fewer numbers than there are symbols, so that a long set does not fit into it, which does no harm where one knows what to look for.

trained: small models, with a prompt that is read twice and without, on text (the loss behind the prompt, at the same places for both) and on a passkey
(a mark and a number somewhere in a prompt of noise, asked for behind it; scored behind prompts of the trained length and of four times that).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from data.loader import Reader, Rows
from data.prompted import PromptReader
from models.mixers.jrt import twice_read
from models.prompt import whole_prompt
from scripts.studies.methods.common import Batches, cost, demo_bytes, model_of, parser_of, settled, train, write
from scripts.studies.options import refuse
from scripts.studies.trainer import Trainer

SHORT, LONG, F, SYMBOLS = 4, 64, 16, 256
PROMPT, T, MASK = 64, 128, 256  # of text
ARMS = ("prompt read twice", "one pass")
NOISE, NUMBERS = 32, 16  # symbols of a passkey's noise, and numbers: then the mark before a number, the question, the mask


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


def sharing(
    short_first: bool, rows: int, draw: torch.Generator, short: int, long: int, symbols: int, apart: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), (rows, short + long + 2): a set, a mark, a set, a question, whose answer is the symbol that is in both. apart: symbols of the long
    set are tokens of their own, so that a token says which set it is of."""
    order = torch.rand(rows, symbols, generator=draw).argsort(1)
    one, other, row = order[:, :short], order[:, short : short + long].clone(), torch.arange(rows)
    answer = one[row, torch.randint(short, (rows,), generator=draw)]
    other[row, torch.randint(long, (rows,), generator=draw)] = answer
    other = other + (symbols + 2) * apart
    mark, sets = torch.full((rows, 1), symbols), (one, other) if short_first else (other, one)
    ids = torch.cat([sets[0], mark, sets[1], mark + 1], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = answer
    return ids, labels


def shared(
    twice: bool, seed: int, steps: int, device: torch.device, sizes: tuple[int, int, int], features: int, width: int, apart: bool = False
) -> dict[str, Any]:
    """A model trained on both orders alike, and the share of right answers in each."""
    short, long, symbols = sizes
    mixer = {"type": "jrt", "n_heads": 4, "feature_dim": features, "prompt": short + long + 2 if twice else 0}
    model = model_of(mixer, (symbols + 2) * (1 + apart), width=width, layers=2, d_ff=2 * width)
    model.init_weights(seed)
    trainer = Trainer(model, device, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
    graph, draw, curve = trainer.graph(lambda ids, labels: trainer.update(ids, labels)[:2]), torch.Generator().manual_seed(seed), []
    for step in range(steps):
        halves = [sharing(first, 32, draw, *sizes, apart) for first in (True, False)]
        with trainer.here():
            ids, labels = (torch.cat(both).to(device) for both in zip(*halves))
            trainer.rate.set(3e-3 * min(1.0, (step + 1) / 50, 4 * (1 - step / steps)))
            loss = graph(ids, labels)[0]
            if step % 100 == 99:
                curve.append(round(float(loss), 4))
    with trainer.here(), torch.no_grad():
        right = {}
        for first in (True, False):
            ids, labels = (t.to(device) for t in sharing(first, 1024, torch.Generator().manual_seed(10**6), *sizes, apart))
            answers = model.eval()(ids).logits[:, -1].argmax(-1)
            right["short first" if first else "long first"] = round(float((answers == labels[:, -1]).float().mean()), 4)
    return {"seed": seed, "right": right, "loss": curve[:: max(1, len(curve) // 10)]}


class Bytes(Reader):
    """Windows of a text drawn from the number of the sample."""

    seq_len = T

    def __init__(self, whole: np.ndarray, seed: int) -> None:
        self.whole, self.seed = whole, seed

    def samples(self, k_R: np.ndarray) -> Rows:
        starts = np.array([np.random.default_rng([self.seed, int(k)]).integers(0, len(self.whole) - T - 1) for k in k_R])
        return self.whole[starts[:, None] + np.arange(T + 1)], np.zeros((len(k_R), T + 1), dtype=np.int32)


class Passkeys(Reader):
    """A prompt of noise with `mark number` in it, that ends with the question; behind it the number."""

    def __init__(self, prompt: int, seed: int) -> None:
        self.prompt, self.seq_len, self.seed = prompt, prompt, seed

    def samples(self, k_R: np.ndarray) -> Rows:
        rows = np.empty((len(k_R), self.prompt + 1), dtype=np.int64)
        for row, k in zip(rows, k_R):
            draw = np.random.default_rng([self.seed, int(k), self.prompt])
            row[:] = draw.integers(0, NOISE, self.prompt + 1)
            at, number = int(draw.integers(0, self.prompt - 2)), NOISE + int(draw.integers(NUMBERS))
            row[at], row[at + 1], row[-2], row[-1] = NOISE + NUMBERS, number, NOISE + NUMBERS + 1, number
        return rows, np.zeros(rows.shape, dtype=np.int32)


def batches_of(reader: Reader, prompt: int, rows: int, mask: int, seed: int) -> Batches:
    """As in training by the program: rows whose prompts have masked tokens; without a prompt plain rows."""
    whole = PromptReader(reader, prompt, 0.15, mask, seed) if prompt else reader

    def draw(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels, _ = whole.labelled(np.arange(step * rows, (step + 1) * rows))
        return torch.from_numpy(inputs.copy()), torch.from_numpy(labels.copy())

    return draw


@torch.no_grad()
def behind(model: Any, reader: Reader, prompt: int, rows: int = 128) -> tuple[float, float]:
    """(nats a token, share that is right) of what comes after the first `prompt` tokens of held-out rows, which are one prompt of the model."""
    tokens, _ = reader.samples(np.arange(rows))
    ids, labels = torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])
    with whole_prompt(model.eval(), prompt):
        nll = model(ids, labels, reduction="none").token_nll[:, prompt - 1 :]
        right = model(ids).logits[:, prompt - 1 :].argmax(-1) == labels[:, prompt - 1 :]
    return round(float(nll.mean()), 4), round(float(right.float().mean()), 4)


def trained(what: str, twice: bool, seed: int, steps: int) -> dict[str, Any]:
    """One model of two layers and width 64, and what it scores behind prompts."""
    prompt = PROMPT if twice else 0
    mixer = {"type": "jrt", "n_heads": 4, "feature_dim": 8, "prompt": prompt}
    if what == "text":
        text, held_out = demo_bytes()
        model = model_of(mixer, MASK + 1, layers=2, d_ff=128)
        _, curve = train(model, batches_of(Bytes(text, seed), prompt, 8, MASK, seed), steps, seed=seed)
        return {"seed": seed, "nats": behind(model, Bytes(held_out, 1), PROMPT)[0], "loss": curve}
    model = model_of(mixer, NOISE + NUMBERS + 3, layers=2, d_ff=128)
    _, curve = train(model, batches_of(Passkeys(PROMPT, seed), prompt, 32, NOISE + NUMBERS + 2, seed), steps, seed=seed)
    return {"seed": seed, "loss": curve, "right": {n: behind(model, Passkeys(n, 10**6), n)[1] for n in (PROMPT, 4 * PROMPT)}}


def main() -> None:
    parser = parser_of(__doc__, "jrt")
    parser.add_argument("--device", default="cpu", help="of the part 'shared'")
    parser.add_argument("--apart", action="store_true", help="of the part 'shared': symbols of the long set are tokens of their own")
    parser.add_argument("--arms", default=",".join(ARMS), help="of the part 'shared'")
    for name, value in (("first-seed", 0), ("steps", 3000), ("short", 4), ("long", 96), ("symbols", 192), ("features", 1), ("width", 32)):
        parser.add_argument(f"--{name}", type=int, default=value, help="of the part 'shared'")
    above_zero = ["steps", "short", "long", "symbols", "features", "width"]
    given = settled(parser, ("sets", "shared", "trained text", "trained passkey", "cost"), above_zero)
    refuse(parser, given, lists={"arms": ARMS})
    if given.short + given.long > given.symbols:
        parser.error(f"--symbols must be at least the {given.short + given.long} of both sets, not {given.symbols}.")
    if "sets" in given.wanted:
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
    if "shared" in given.wanted:
        device, rows_of = torch.device(given.device), dict[str, list[dict[str, Any]]]()
        sizes = (given.short, given.long, given.symbols)
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            for name in given.arms.split(","):
                rows_of.setdefault(name, []).append(
                    shared(name != "one pass", seed, given.steps, device, sizes, given.features, given.width, given.apart)
                )
                print(name, rows_of[name][-1], flush=True)
                settings = {
                    "short": given.short,
                    "long": given.long,
                    "symbols": given.symbols,
                    "features": given.features,
                    "steps": given.steps,
                    "apart": given.apart,
                }
                write(given.out, trained_shared={**settings, "device": given.device, "runs": rows_of})
    for what, steps in (("text", 300), ("passkey", 300)):
        if f"trained {what}" in given.wanted:
            before = json.loads(given.out.read_text()) if given.out.exists() else {}
            runs: dict[str, list[dict[str, Any]]] = before.get(f"trained_{what}", {}).get("runs") or {
                "prompt read twice": [],
                "one pass": [],
            }
            for seed in range(given.seeds):
                for name, rows in runs.items():
                    if any(row["seed"] == seed for row in rows):
                        continue  # was run before
                    rows.append(trained(what, name != "one pass", seed, steps))
                    print(what, name, rows[-1], flush=True)
                    write(given.out, **{f"trained_{what}": {"steps": steps, "prompt": PROMPT, "runs": runs}})
    if "cost" in given.wanted:
        write(
            given.out, cost={name: cost({"type": "jrt", "n_heads": 4, "prompt": p}) for name, p in (("causal", 0), ("prompt of 128", 128))}
        )


if __name__ == "__main__":
    main()
