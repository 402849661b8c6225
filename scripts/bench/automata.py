"""Starts by composed maps (kernels/dense_rnn/automata.py) against the walk in order, end to end with all candidates, on trackers; JSON to --out.

python -m scripts.bench.automata --out docs/results/dense_rnn/automata.json                  # one GPU, a minute and a half
python -m scripts.bench.automata --out automata.json --device cpu --seconds 300 --train 200  # in plain torch: a trained tracker, nothing timed
python -m scripts.bench.automata --out automata.json --seconds 0 --train 60 --groups S3,S4   # trained trackers alone

Exact trackers of parity, mod-5, S3, S4 and A5 (scripts/bench/trackers.py) at one row of 16,384 to 65,536 steps in bf16, then a GRU that was trained
for --train seconds to follow S3, or one for each of --groups. Each row says slices and candidates, times of both as they are called and as CUDA graphs, and whether all is
equal bit for bit; `walked` is the share of slices that were not certified and walked in order.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dense_rnn import automata, launch, reference
from kernels.dense_rnn.automata import REPEATS
from kernels.dense_rnn.dictionary import SETTLE, Dictionary, slices_for
from kernels.dense_rnn.maps import CANDIDATES
from kernels.parallel_rnn.cell import Cell
from models.cells import load_cell
from scripts.bench.timing import Results, attempted, milliseconds
from scripts.bench.trackers import TRACKERS, products, size, tracker
from scripts.studies.options import refuse

SHAPES = [("S3", 65536, 1), ("S3", 16384, 12), ("S4", 65536, 1), ("A5", 65536, 1), ("parity", 65536, 1), ("mod-5", 65536, 1)]
SHAPES += [("S4", 16384, 1), ("A5", 16384, 1), ("S3", 65536, 12), ("S4", 65536, 12), ("S3", 16384, 1)]
SLICES = (64, 128, 256, 512, 1024)
WIDTH, LONGEST, BATCH = 64, 48, 512  # of the trained tracker


def graphed(f: Callable[[], Any]) -> Callable[[], Any]:
    """f as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def compared(cell: Cell, given: list[Tensor], dictionary: Tensor, slices: int, settle: int, repeats: int) -> dict[str, Any]:
    """Both ways, their distance, and their times."""
    K = given[2].shape[1]
    plan = launch.Plan.of(given[0], K, 1)

    def walk() -> tuple[Tensor, ...]:
        return launch.forward(cell, *(*given, None, plan))

    def composed() -> tuple[Tensor, ...]:
        return automata.forward(cell, *(*given, None, dictionary, slices, settle, repeats))

    wanted, (emitted, kept, final, bad) = walk(), composed()
    n = launch.Plan.of(given[0], K, slices, 0).slices
    row: dict[str, Any] = {
        "slices": n, "settle": settle, "repeats": repeats, "walked": ((n - bad).float().mean() / n).item(),
        "same_bits": all(torch.equal(a, b) for a, b in zip(wanted, (emitted, kept, final))),
        "distance": (wanted[0].float() - emitted.float()).abs().max().item(),
    }  # fmt: skip
    if row["walked"] < 0.05:
        row |= {"ms": milliseconds(composed, 5), "graph_ms": milliseconds(graphed(composed), 5)}
    return row


def borders(cell: Cell, given: list[Tensor], E: int, M: int) -> Dictionary:
    """A dictionary of the states of these words."""
    states, *_ = launch.forward(cell, *(*given, None, launch.Plan.of(given[0], given[2].shape[1], 1)))
    dictionary = Dictionary(E, M, 1, given[2].shape[1]).to(states.device)
    dictionary.learn(states[:, 32:, None].flatten(0, 1).float())
    return dictionary


def exact(name: str, T: int, E: int, device: torch.device, out: Results, limit: float) -> dict[str, Any]:
    """One row of words, walked and composed over as many slices as are fastest, with as many candidates as a plan takes; then with one for each
    element of the group."""
    cell, (K, n) = load_cell("dense_gru"), size(name)
    M = next(m for m in CANDIDATES if m >= K)
    seen = list(tracker(name, cell, 1, 40 * K, E, torch.bfloat16, device, seed=1))
    given = list(tracker(name, cell, 1, T, E, torch.bfloat16, device))
    plan = launch.Plan.of(given[0], K, 1)
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    about = {"tracker": name, "shape": [1, T, E, K], "candidates": M, "reckoned": slices_for(1, T, E, M, programs)}
    walk = milliseconds(lambda: launch.forward(cell, *(*given, None, plan)), 5)
    corrected = milliseconds(lambda: launch.forward(cell, *(*given, None)), 3) if name == "S3" else None
    rows, few = [], borders(cell, seen, E, M).states
    for slices in SLICES:
        if out.elapsed() < limit:
            rows.append(attempted(partial(compared, cell, given, few, slices, SETTLE, REPEATS)))
    best: dict[str, Any] = min((r for r in rows if "graph_ms" in r), key=lambda r: r["graph_ms"], default={})
    fewer = {}
    if best and out.elapsed() < limit:
        fewer = attempted(partial(compared, cell, given, borders(cell, seen, E, n).states, best["slices"], SETTLE, REPEATS))
    return {
        **about, "walk_ms": walk, "corrections_then_walk_ms": corrected, "best": best, "one_for_each_element": {"candidates": n, **fewer},
        "all": [[r.get("slices"), r.get("graph_ms"), r.get("same_bits"), r.get("error")] for r in rows],
    }  # fmt: skip


def train(seconds: float, device: torch.device, name: str = "S3") -> tuple[nn.ModuleList, float]:
    """(embedding, GRU, head) that follow the group's products, and the accuracy over words of 1,024."""
    moves, neutral = products(name)
    X, n = moves.shape
    moves = moves.to(device)
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(X, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, n)]).to(device)
    optimizer, length, began, step = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-3), 2, time.monotonic(), 0

    def words(rows: int, T: int) -> tuple[Tensor, Tensor]:
        read = torch.randint(X, (rows, T), device=device)
        at, out = torch.full((rows,), neutral, device=device), []
        for t in range(T):
            at = moves[read[:, t], at]
            out.append(at)
        return read, torch.stack(out, 1)

    while (passed := (time.monotonic() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 if passed < 0.5 else max(0.02, 2 * (1 - passed)))
        read, wanted = words(BATCH if device.type == "cuda" else 64, length)
        answers = model[2](model[1](model[0](read))[0])
        loss = F.cross_entropy(answers.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        step += 1
        if step % 20 == 0 and length < LONGEST and (answers.argmax(-1) == wanted)[:, -1].float().mean() > 0.98:
            length = min(LONGEST, length + max(1, length // 5))
    with torch.no_grad():
        read, wanted = words(16, 1024)
        return model, (model[2](model[1](model[0](read))[0]).argmax(-1) == wanted).float().mean().item()


@torch.no_grad()
def given_of(model: nn.ModuleList, B: int, T: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Arguments of the cell dense_gru that do what the trained torch.nn.GRU does, on random words."""
    gru, device = model[1], model[0].weight.device
    words = torch.randint(model[0].num_embeddings, (B, T), generator=torch.Generator().manual_seed(seed)).to(device)
    W, R, b, c = (getattr(gru, f"{kind}_l0").unflatten(0, (3, WIDTH)) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    bias = b + torch.cat([c[:2], torch.zeros_like(c[2:])])
    pre = torch.einsum("btd,pkd->btpk", model[0](words), W) + bias
    return [pre.to(dtype), c[2:].clone(), R.permute(2, 0, 1)[None].contiguous(), torch.zeros(B, 1, WIDTH, device=device)]


def trained_on_gpu(model: nn.ModuleList, accuracy: float, name: str, T: int) -> dict[str, Any]:
    """Twice as many candidates as the group has elements, and more, over slices of 128 to 512 steps in bf16."""
    cell, few = load_cell("dense_gru"), 2 * size(name)[1]
    given, seen = given_of(model, 1, T, torch.bfloat16, 0), given_of(model, 4, 1024, torch.bfloat16, 1)
    walk = milliseconds(lambda: launch.forward(cell, *(*given, None, launch.Plan.of(given[0], WIDTH, 1))), 5)
    rows = []
    for M in (few, *[m for m in CANDIDATES if m > few][:2]):
        dictionary = borders(cell, seen, 1, M)
        for slices in (T // 512, T // 256, T // 128):
            row = attempted(partial(compared, cell, given, dictionary.states, slices, 16, 3))
            rows.append({"candidates": M, "spread": dictionary.spread.max().item(), **row})
    return {"group": name, "accuracy": accuracy, "shape": [1, T, 1, WIDTH], "walk_ms": walk, "rows": rows}


def trained_in_torch(model: nn.ModuleList, accuracy: float, name: str, T: int = 1024) -> dict[str, Any]:
    """What repetition and composed maps take, in fp32 and plain torch."""
    cell, elements = load_cell("dense_gru"), size(name)[1]
    given, seen = given_of(model, 4, T, torch.float32, 0), given_of(model, 4, 512, torch.float32, 1)
    wanted, states = (reference.sequential(cell, g[0], g[1], g[2], g[3], None)[0] for g in (given, seen))
    rows = []
    for M in (elements, 2 * elements, next(m for m in CANDIDATES if m > 2 * elements)):
        dictionary = Dictionary(1, M, 1, WIDTH)
        dictionary.learn(states[:, 32:].flatten(0, 1))
        for n in (8, 16, 32):
            got = automata.solve(cell, *(*given, None, dictionary.states, n, 16, 3))
            error = (got - wanted).abs().max().item()
            rows.append({"candidates": M, "spread": dictionary.spread.max().item(), "distance": error, **vars(automata.last_report)})
    reference.solve(cell, *given, None, 16)
    return {"group": name, "accuracy": accuracy, "rows": rows, "corrections_of_16_slices": reference.last_report.corrections}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=90.0, help="for all of it, but what was begun is ended")
    parser.add_argument("--train", type=float, default=20.0, help="seconds of training a tracker; 0: none")
    parser.add_argument("--groups", default="S3", help="of the trained trackers")
    given = parser.parse_args()
    refuse(parser, given, lists={"groups": TRACKERS})
    given.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(given.device)
    out = Results(given.out, device)
    shapes = SHAPES if device.type == "cuda" else []
    rest = given.seconds - given.train * 1.4
    for name, T, E in shapes:
        if out.elapsed() < rest:
            out.append("exact", attempted(partial(exact, name, T, E, device, out, rest)))
    for name in given.groups.split(",") if given.train else ():
        model, accuracy = train(given.train, device, name)
        for T in (16384, 65536) if shapes else (1024,):
            measure = partial(trained_on_gpu, model, accuracy, name, T) if shapes else partial(trained_in_torch, model, accuracy, name)
            out.append("trained", attempted(measure))


if __name__ == "__main__":
    main()
