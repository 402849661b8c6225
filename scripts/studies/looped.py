"""Copying and reversing at four times the trained length: layers that are looped against as many layers of their own; JSON to --out.

    python -m scripts.studies.looped --out looped.json                              # three seeds, an hour on one core
    python -m scripts.studies.looped --out looped.json --pattern whole --arms universal,unlooped     # layers of ordinary attention
    python -m scripts.studies.looped --out copy.json --pattern next --arms by_length --tasks copy    # a loop more for each symbol

A row is n different symbols (with --repeats any of --symbols, so that a symbol does not say where it stood), a mark that says copy or reverse, and the
answer, n drawn from 1 to 16 (--length); answers are scored for 16, 32 and 64 symbols. With --start a second mark stands before the answer: then a symbol
lies n + 1 places before its copy and 2 i before the place that says it as the i-th of a reversed row, so that n + 1 loops of one and of two places are
just right. --grow lets n grow from 1, by one when a share of the answers is right. The models spend the same FLOPs on a token in their blocks: the layers of --pattern four times, or four times as many layers. The pattern is
near,far (a window with rotary positions, and attention without positions, which can find a symbol at any distance), whole (rotary attention), or
next or three (a window of two or three tokens). --noise is added to what is carried from loop to loop in training, so that it has to stand errors. Only the looped ones can be run for longer, and are, too. Arms: looped draws the number of its loops, steady does not,
by_length takes n + 1 loops for n symbols in training and scoring (Fan et al. 2024, arXiv 2409.15647; every batch then has one n).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import write_json
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.studies.graphed import GraphedStep
from scripts.studies.options import refuse
from scripts.studies.trainer import Trainer
from training.watch.metrics import environment

LENGTH, BATCH, SYMBOLS, LOOPS = 16, 64, 72, 4
COPY, REVERSE, PAD, START, VOCABULARY = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2, SYMBOLS + 3, 80
MIXERS = {"near": {"type": "attention", "n_heads": 4, "window": 4}, "far": {"type": "attention", "n_heads": 4, "rope": False}}
MIXERS["whole"] = {"type": "attention", "n_heads": 4}
MIXERS["next"] = {"type": "attention", "n_heads": 4, "window": 2}
MIXERS["three"] = {"type": "attention", "n_heads": 4, "window": 3}
RECURRENT = {"type": "recurrent", "prelude": 0, "coda": 0, "loops": LOOPS, "spread": 0.5, "backprop": LOOPS}
ARMS: dict[str, dict[str, Any]] = {
    "looped": {"depth": RECURRENT},
    "steady": {"depth": {**RECURRENT, "spread": 0.0}},
    "universal": {"depth": {"type": "universal", "loops": LOOPS}},
    "by_length": {"depth": {**RECURRENT, "spread": 0.0, "loops": LENGTH // 2, "backprop": 4 * LENGTH + 1}},
    "unlooped": {},
}
BOTH = ("copy", "reverse")


def rows_of(
    rows: int,
    lengths: Tensor,
    draw: torch.Generator,
    tasks: tuple[str, ...] = BOTH,
    repeated: int = 0,
    start: bool = False,
    unseen: bool = False,
    later: bool = False,
) -> tuple[Tensor, Tensor]:
    """(ids, labels), both (rows, 2 max(lengths) + 1), of one of `tasks` drawn for each row; what lies behind an answer is padding. repeated: symbols
    that are drawn again and again; 0: all of a row differ. start: a second mark before the answer, and a token more. unseen: the answer is not
    among the ids, the task's mark stands in each of its places. later: copies stand n + 1 places further on, padding before them."""
    longest, n = int(lengths.max()), lengths[:, None]
    if repeated:
        x = torch.randint(repeated, (rows, longest), generator=draw)
    else:
        x = torch.rand(rows, SYMBOLS, generator=draw).argsort(1)[:, :longest]
    reverse = torch.tensor([task == "reverse" for task in tasks])[torch.randint(len(tasks), (rows, 1), generator=draw)]
    place = torch.arange((3 if later else 2) * longest + 1 + start + later)[None]
    first = n + 1 + start + torch.where(reverse, 0, n + 1) * later  # where the answer begins
    i = place - first  # of the answer, whose symbol is told one place before
    told, told_next = torch.where(reverse, n - 1 - i, i), torch.where(reverse, n - 2 - i, i + 1)
    ids = torch.where(place < n, x.gather(1, place.clamp(max=longest - 1).expand(rows, -1)), x.gather(1, told.clamp(0, longest - 1)))
    marked = (place >= n) if unseen else (place == n)
    ids = torch.where(marked, torch.where(reverse, REVERSE, COPY), ids)
    ids = torch.where((place > n) & (place < first) & ~marked, PAD, ids)
    ids = torch.where(place == first - 1, START, ids) if start else ids
    ids = torch.where(place >= first + n - 1, PAD, ids)
    asked = (place >= first - 1) & (place < first + n - 1)
    return ids, torch.where(asked, x.gather(1, told_next.clamp(0, longest - 1)), -100)


def drawn_rows(rows: int, lengths: Tensor, draw: torch.Generator, given: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """`rows_of` as the options say."""
    repeated = given.symbols if given.repeats else 0
    return rows_of(rows, lengths, draw, tuple(given.tasks.split(",")), repeated, given.start, given.unseen, given.later)


def model_of(arm: str, pattern: list[str], layers: int = 0, width: int = 64) -> LanguageModel:
    """layers: of the unlooped arm; 0: as many as the looped ones visit."""
    layers = len(pattern) if ARMS[arm] else layers or len(pattern) * LOOPS
    mixers = {name: MIXERS[name] for name in pattern}
    return LanguageModel(
        ModelConfig(
            vocab_size=VOCABULARY,
            d_model=width,
            n_layers=layers,
            d_ff=2 * width,
            pattern=pattern,
            mixers=mixers,
            init_std=0.05,
            **ARMS[arm],
        )
    )


@torch.no_grad()
def right_at(model: LanguageModel, n: int, given: argparse.Namespace, seed: int = 0) -> dict[str, tuple[int, int]]:
    """{copy, reverse}: how many of the answered symbols of 128 rows of n are right, each read with the right ones before it (or with none of them,
    --unseen), and how many there are."""
    drawn = drawn_rows(128, torch.full((128,), n), torch.Generator().manual_seed(n + seed), given)
    ids, labels = (t.to(given.device) for t in drawn)
    right, asked = model.eval()(ids).logits.argmax(-1) == labels, labels != -100
    marks = (
        (name, asked & (ids[:, n : n + 1] == mark))
        for name, mark in (("copy", COPY), ("reverse", REVERSE))
        if name in given.tasks.split(",")
    )
    return {name: (int(right[mine].sum()), int(mine.sum())) for name, mine in marks}


def scores(
    model: LanguageModel, given: argparse.Namespace, loops: int | None = None, by_length: bool = False
) -> dict[str, dict[str, float]]:
    """{length: {copy, reverse}}: the share of answered symbols that are right. loops: of a looped model; by_length: a loop more than there are symbols."""
    way: Any = model.depth
    before = None if way is None else way.loops
    out: dict[str, dict[str, float]] = {}
    for n in (given.length, 2 * given.length, 4 * given.length):
        if way is not None:
            way.loops = n + 1 if by_length else loops or before
        out[str(n)] = {name: round(right / asked, 4) for name, (right, asked) in right_at(model, n, given).items()}
    if way is not None:
        way.loops = before
    return out


def arm(name: str, pattern: list[str], seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One model, trained and scored."""
    model, began = model_of(name, pattern, given.layers, given.width), time.monotonic()
    steps, lr, device, size = given.steps, given.lr, given.device, given.rows
    by_length = name == "by_length"
    where = torch.device(device)
    model.init_weights(seed)
    noise = torch.full((), given.noise, device=where)
    if model.depth is not None and given.noise:
        norm: Any = model.depth
        norm.norm.register_forward_hook(noisy(noise))
    trainer = Trainer(model, where, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    graphs: dict[tuple[int, int], GraphedStep] = {}  # by length of rows and loops beyond, where all of a batch have one length
    draw, curve = torch.Generator().manual_seed(seed + 1), []
    one_length = given.one_length or by_length
    longest = 1 if given.grow else given.length
    for step in range(steps):
        share = max(step / steps, (time.monotonic() - began) / given.seconds if given.seconds else 0.0)  # of the training
        if share >= 1:
            steps = step
            break
        if longest < given.length and step % 50 == 49 and solved(model, trainer, longest, by_length, given):
            longest += 1
            print(name, seed, "rows of", longest, "from step", step, flush=True)
        model.train().begin_step(seed, step)
        lengths = torch.randint(1, longest + 1, (1 if one_length else size,), generator=draw).expand(size)
        if given.hard and float(torch.rand((), generator=draw)) < given.hard:
            lengths = torch.full((size,), longest)
        n, more = int(lengths[0]), 0
        if by_length:
            more = int(torch.randint(given.more + 1, (1,), generator=draw)) if given.more else 0
            way: Any = model.depth
            way.drawn = n + 1 + more
        if (n, more) not in graphs or not one_length or name == "looped":
            graphs[n, more] = trainer.graph(lambda ids, labels: trainer.update(ids, labels)[:2])
            if not one_length or name == "looped":
                graphs[n, more].why_not = "lengths or loops differ"
        rows = drawn_rows(size, lengths, draw, given)
        with trainer.here():
            ids, labels = (t.to(device) for t in rows)  # on this stream, whose memory they are then
            if given.noise_from:  # grows over a tenth of the steps
                noise.fill_(given.noise * min(1.0, max(0.0, 10 * (step / steps - given.noise_from))))
            trainer.rate.set(lr * min(1.0, (step + 1) / 100, 2 * (1 - share)))
            loss = graphs[n, more](ids, labels)[0]
            if step % 100 == 99:
                curve.append(round(loss.item(), 4))
        if step % 1000 == 999:
            print(name, seed, step + 1, curve[-1], flush=True)
    if where.type == "cuda":
        torch.cuda.synchronize()
    result = {
        "arm": name, "pattern": pattern, "tasks": given.tasks.split(","), "layers": model.config.n_layers, "seed": seed, "steps": steps, "lr": lr,
        "parameters": sum(p.numel() for p in model.parameters()), "flops_per_token": model.flops_per_token(2 * given.length),
        "symbols": given.symbols if given.repeats else "different", "length": given.length, "rows": size, "width": given.width, "unseen": given.unseen,
        "later": given.later, "noise": given.noise, "noise_from": given.noise_from, "start": given.start, "grow": given.grow,
        "hard": given.hard, "more": given.more, "longest": longest,
        "seconds": round(time.monotonic() - began, 1), "scores": scores(model, given, None, by_length), "loss": curve,
    }  # fmt: skip
    if model.depth is not None and not by_length:
        result["by_loops"] = {str(n): scores(model, given, n) for n in (1, 2, 3, 4, 6, 8, 16)}
    print(name, seed, result["scores"], result.get("by_loops"), flush=True)
    return result


def solved(model: LanguageModel, trainer: Trainer, n: int, by_length: bool, given: argparse.Namespace) -> bool:
    """Whether each of the tasks is right for the share --grow of rows of n."""
    way: Any = model.depth
    before = None if way is None else way.loops
    if by_length:
        way.loops = n + 1
    with trainer.here():
        found = right_at(model, n, given, seed=10**6)
    if way is not None:
        way.loops = before
    return all(right >= given.grow * asked for right, asked in found.values())


def noisy(size: Tensor) -> Any:
    """A hook of the norm after each loop that adds noise of this size in training, beside values of about one."""
    return lambda module, inputs, made: made + size * torch.randn_like(made) if module.training else made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default="looped,universal,unlooped", help=f"which of {', '.join(ARMS)}, with commas between them")
    parser.add_argument("--pattern", default="near,far", help="mixers of the layers that are looped")
    parser.add_argument(
        "--length", type=int, default=LENGTH, help="most symbols of a row in training; scored for as many, twice and four times that"
    )
    parser.add_argument("--layers", type=int, default=0, help="of the unlooped arm; 0: as many as the looped ones visit")
    parser.add_argument("--tasks", default="copy,reverse")
    parser.add_argument("--symbols", type=int, default=10, help="with --repeats")
    parser.add_argument("--repeats", action="store_true", help="the symbols of a row are drawn with repeats")
    parser.add_argument("--noise", type=float, default=0.0, help="of the looped arms in training")
    parser.add_argument("--noise-from", type=float, default=0.0, help="share of the steps before the noise")
    parser.add_argument("--one-length", action="store_true", help="all rows of a batch have one number of symbols, as by_length has them")
    parser.add_argument("--start", action="store_true", help="a second mark before the answer")
    parser.add_argument("--unseen", action="store_true", help="the answer is not read: the task's mark stands in each of its places")
    parser.add_argument("--later", action="store_true", help="copies stand n + 1 places later, so that steps of two places are just right")
    parser.add_argument("--rows", type=int, default=BATCH, help="of a batch")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument(
        "--more", type=int, default=0, help="of by_length: up to so many loops beyond n + 1 in training, so that an answer must stay"
    )
    parser.add_argument(
        "--grow", type=float, default=0.0, help="rows have one symbol at first, and one more when this share is right; 0: all lengths"
    )
    parser.add_argument("--hard", type=float, default=0.0, help="share of the batches whose rows all have the most symbols so far")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="a training ends after so many if its steps take longer; 0: after its steps"
    )
    parser.add_argument("--seeds", default="0,1,2", help="with commas between them")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    refuse(parser, given, ["steps", "lr", "symbols", "length", "rows", "width"], {"arms": ARMS, "tasks": BOTH, "pattern": MIXERS})
    if not all(seed.strip().isdigit() for seed in given.seeds.split(",")) or not (0 <= given.grow <= 1 and 0 <= given.hard <= 1):
        parser.error(
            f"--seeds are numbers with commas between them, --grow and --hard shares; not {given.seeds!r}, {given.grow} and {given.hard}."
        )
    results: list[dict[str, Any]] = []
    for seed in map(int, given.seeds.split(",")):
        for name in given.arms.split(","):
            results.append(arm(name, given.pattern.split(","), seed, given))
            given.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(given.out, {"runs": results, "environment": environment(torch.device(given.device))})


if __name__ == "__main__":
    main()
