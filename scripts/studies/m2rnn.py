"""M2RNN on a CPU: what groups one layer learns to follow, and whether a solve over slices of time would converge; JSON to --out.

python -m scripts.studies.m2rnn --out tracking.json                                        # S3, S4, A5 beside a gated delta rule, ten minutes
python -m scripts.studies.m2rnn --out corrections.json --parts corrections                 # random weights, and those of a trained model of bytes

Tracking: one layer of width 64, four heads of 16, trained on products of 8 elements for 1,000 steps, then of 16, and scored at 16, 32 and 64, from the
published start and from others. Corrections: of starts of slices by the diagonal of the Jacobian, f + (1 - f) (1 - tanh^2) diag(W), in fp32, until
every start is the end of the slice before it but for a share of the largest value of that row of the state.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.files import write_json
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.studies.delta_tracking import BATCH, CHECK, LENGTH, problem, table
from scripts.studies.options import refuse

SMALL = {"type": "m2rnn", "n_heads": 4, "head_dim": 16}
WIDE = {"type": "m2rnn", "n_heads": 2, "head_dim": 4, "expand_v": 8.0}
# Starts other than the published ones: noise, W is noise of deviation 1 / sqrt(V) instead of the identity; keep, every f at an input of zero;
# inputs, the convolution's weights are so many times as large, so that products of keys and values leave the straight part of the tanh.
OTHER = {"noise": True, "keep": 0.27, "inputs": 3.0}
ARMS: dict[str, dict[str, Any]] = {
    "m2rnn": SMALL,
    "m2rnn, noise": {**SMALL, "noise": True},
    "m2rnn, noise, fast": {**SMALL, "noise": True, "keep": 0.27},
    "m2rnn, noise, inputs": {**SMALL, "noise": True, "inputs": 3.0},
    "m2rnn, fast, inputs": {**SMALL, "keep": 0.27, "inputs": 3.0},
    "m2rnn, noise, fast, inputs": {**SMALL, **OTHER},
    "m2rnn, 32 columns": WIDE,
    "m2rnn, 32 columns, noise, fast, inputs": {**WIDE, **OTHER},
    "m2rnn, 64 rows": {"type": "m2rnn", "n_heads": 4, "n_k_heads": 1, "head_dim": 64, "expand_v": 0.25},
    "m2rnn, 64 rows, noise, fast, inputs": {"type": "m2rnn", "n_heads": 4, "n_k_heads": 1, "head_dim": 64, "expand_v": 0.25, **OTHER},
    "gated_deltanet": {"type": "delta", "n_heads": 4, "head_dim": 16},
}
SHARES = {"2^-8": 2.0**-8, "2^-18": 2.0**-18}
BURN_IN = 32
SHORT = 1000  # steps on half of the length


@torch.no_grad()
def scored(model: LanguageModel, products: Tensor, device: str) -> dict[str, dict[str, float]]:
    """Accuracy over all positions and of the last answer, by length."""
    out = {}
    for length in (LENGTH, 2 * LENGTH, 4 * LENGTH):
        ids, wanted = problem(products, 256, length, torch.Generator().manual_seed(10**6 + length))
        right = (model(ids.to(device)).logits.argmax(-1).cpu() == wanted).float()
        out[str(length)] = {"all": round(right.mean().item(), 4), "last": round(right[:, -1].mean().item(), 4)}
    return out


@torch.no_grad()
def start_otherwise(model: LanguageModel, noise: bool = False, keep: float = 0.0, inputs: float = 1.0) -> None:
    """Starts as of OTHER."""
    for block in model.blocks:
        m = block.mixer
        if noise:
            m.state_weight.normal_(0.0, m.V**-0.5)
        if keep:
            m.A_log.zero_()
            m.dt_bias.fill_(math.log(1 / keep - 1))  # softplus of it is -log(keep)
        m.conv.weight.mul_(inputs)


def tracked(mixer: str, group: str, seed: int, seconds: float, device: str, rate: float = 3e-3) -> dict[str, Any]:
    """Trains one model for so long, or until it is solved at four times the length."""
    torch.manual_seed(seed)
    products, began = table(group), time.monotonic()
    settings: dict[str, Any] = {"vocab_size": len(products), "d_model": 64, "n_layers": 1, "d_ff": 0, "init_std": 0.125}
    arm = {key: value for key, value in ARMS[mixer].items() if key not in OTHER}
    model = LanguageModel(ModelConfig(**settings, pattern=["m"], mixers={"m": arm}))
    model.init_weights(seed)
    start_otherwise(model, **{key: ARMS[mixer][key] for key in OTHER if key in ARMS[mixer]})
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    draw, curve, solved, step = torch.Generator().manual_seed(seed + 1), [], False, 0
    while time.monotonic() - began < seconds and not solved:
        for group_ in optimizer.param_groups:  # a short rise
            group_["lr"] = rate * min(1.0, (step + 1) / 50)
        ids, wanted = (x.to(device) for x in problem(products, BATCH, LENGTH // (2 if step < SHORT else 1), draw))
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), wanted.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % CHECK == 0:
            now = scored(model, products, device)
            far = now[str(4 * LENGTH)]["all"]
            curve.append({"step": step, "loss": round(loss.item(), 4), "accuracy": now[str(LENGTH)]["all"], "far": far})
            solved = far > 0.98
            print(mixer, group, seed, curve[-1], flush=True)
    return {
        "mixer": mixer, "group": group, "seed": seed, "steps": step, "ended": "solved" if solved else "time", "chance": round(1 / len(products), 4),
        "seconds": round(time.monotonic() - began), "scores": scored(model, products, device), "curve": curve,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


@torch.no_grad()
def corrections(k: Tensor, v: Tensor, g: Tensor, w: Tensor, slices: int) -> dict[str, int | str]:
    """Corrections after the first pass until the gaps of all slices are within each of SHARES; 'all' where only the walk in order gets there."""
    (B, T, H, K), V = k.shape, v.shape[3]
    length, f = T // slices, torch.exp(g)
    at_start, diagonal = torch.arange(slices) * length, torch.diagonal(w, dim1=-2, dim2=-1)[:, None]

    def walked(h: Tensor, first: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        product = torch.ones_like(h)
        for s in range(steps):
            live, t = first + s >= 0, (first + s).clamp(min=0)
            z = torch.tanh(h @ w + k[:, t][..., None] * v[:, t][..., None, :])
            keep = f[:, t][..., None, None]
            h = torch.where(live[:, None, None, None], keep * h + (1 - keep) * z, h)
            product = product * (keep + (1 - keep) * (1 - z * z) * diagonal)
        return h, product

    begins, _ = walked(torch.zeros(B, slices, H, K, V), at_start - BURN_IN, BURN_IN)
    needed: dict[str, int | str] = {}
    for n in range(slices):
        ends, products = walked(begins, at_start, length)
        new, change = begins.clone(), torch.zeros(B, H, K, V)
        for s in range(1, slices):
            new[:, s] = ends[:, s - 1] + products[:, s - 1] * change
            change = new[:, s] - begins[:, s]
        gap = (ends[:, :-1] - begins[:, 1:]).abs().amax(-1) / ends[:, :-1].abs().amax(-1).clamp(min=1e-30)
        for name, share in SHARES.items():
            if gap.max() <= share:
                needed.setdefault(name, n if n < slices - 1 else "all")
        begins = new
    return needed


def of_random_weights() -> list[dict[str, Any]]:
    rows, r = [], torch.Generator().manual_seed(0)
    B, T, H, K = 1, 512, 2, 32
    noise = torch.randn(H, K, K, generator=r) * K**-0.5
    eye = torch.eye(K).expand(H, K, K)
    for name, w in {
        "identity": eye,
        "identity + noise 0.1": eye + 0.1 * noise,
        "half identity, half noise": 0.5 * (eye + noise),
        "noise": noise,
    }.items():
        for keep in (0.9, 0.99):
            k, v = (torch.randn(B, T, H, K, generator=r) for _ in range(2))
            g = torch.full((B, T, H), keep).log()
            row = {"weights": name, "f": keep, **{str(n): corrections(k, v, g, w, n) for n in (8, 16)}}
            rows.append(row)
            print(row, flush=True)
    return rows


def of_a_trained_model(data: Path, steps: int) -> list[dict[str, Any]]:
    """Two layers of width 128 with two heads of 64, on windows of 128 bytes, before and after so many steps."""
    from scripts.studies.text import Text

    text = Text(data, 128, torch.device("cpu"))
    torch.manual_seed(0)
    settings: dict[str, Any] = {"vocab_size": text.vocab_size, "d_model": 128, "n_layers": 2, "d_ff": -1}
    model = LanguageModel(ModelConfig(**settings, pattern=["m"], mixers={"m": {"type": "m2rnn", "n_heads": 2}}))
    model.init_weights(0)
    rows: list[dict[str, Any]] = []
    ids = torch.from_numpy(text.valid_set.rows(np.array([0]), 512)[0])
    for trained in (0, steps):
        if trained:
            text.train(model, steps=steps, rows=16, rate=3e-3, seed=0)
        nats = text.held_out(model, windows=32)
        for layer, given in enumerate(inputs_of(model, ids)):
            w = given[3]
            row = {
                "steps": trained, "layer": layer, "nats": round(float(nats), 3), "norms of W": [round(x, 2) for x in torch.linalg.matrix_norm(w, 2).tolist()],
                "f": [round(x, 4) for x in torch.exp(given[2]).mean((0, 1)).tolist()],
                **{str(n): corrections(*(*given, n)) for n in (8, 16)},
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    return rows


@torch.no_grad()
def inputs_of(model: LanguageModel, ids: Tensor) -> list[list[Tensor]]:
    """k, v, g and W of every layer's recurrence on these tokens."""
    import models.mixers.m2rnn as module

    seen: list[list[Tensor]] = []
    original = module.m2rnn

    def watched(q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append([k.float(), v.float(), g.float(), w.detach().float()])
        return original(*(q, k, v, g, w, *rest))

    module.m2rnn = watched  # type: ignore[assignment]
    try:
        model(ids)
    finally:
        module.m2rnn = original
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="tracking", help="tracking,corrections")
    parser.add_argument("--groups", default="s3,s4,a5")
    parser.add_argument("--mixers", default=";".join(ARMS), help="arms, divided by semicolons")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=100.0, help="of a model of the tracking")
    parser.add_argument("--device", default="cpu", help="of the tracking")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="shards for the trained model of the corrections")
    parser.add_argument("--steps", type=int, default=150, help="of its training")
    given = parser.parse_args()
    refuse(parser, given, ["seeds", "seconds", "steps"], {"parts": ("tracking", "corrections")})
    refuse(parser, given, lists={"mixers": ARMS}, between=";")
    if given.data and not (given.data / "meta.json").exists():
        parser.error(f"--data: {given.data} holds no token shards; python -m data.prepare makes them.")
    results: dict[str, list[dict[str, Any]]] = {}
    write = functools.partial(write_json, given.out, results)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if "tracking" in given.parts:
        for group in given.groups.split(","):
            for seed in range(given.first_seed, given.first_seed + given.seeds):
                for mixer in given.mixers.split(";"):
                    results.setdefault("tracking", []).append(tracked(mixer, group, seed, given.seconds, given.device))
                    write()
    if "corrections" in given.parts:
        results["random"] = of_random_weights()
        if given.data:
            results["trained"] = of_a_trained_model(given.data, given.steps)
        write()


if __name__ == "__main__":
    main()
