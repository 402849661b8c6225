"""What the generators share: draws, comparisons, and running many cases, each of which prints as a line that runs it again.

A case gives, for the same inputs, the answers of what is tested, of float64, and of a plain loop in fp32. What is tested may lose a small multiple
of what that loop loses, and in 16 bits of what rounding the answers loses.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data.files import write_json

# what may be lost: multiples of the loop's loss and of the rounding's, and an fp32 sum's last digits
LOOPS, ROUNDINGS, FLOOR = 8.0, 2.0, 4e-6
ROW, ZERO = 1e-3, 1e-30  # of the largest value: rows below are compared on this scale; and what counts as nothing
DEVICES = ("cpu", "interpreter", "cuda")
WHOLE = "0/1"  # of the cases: the part of a process that runs alone
LOST = 3  # exit status of a process whose GPU answers no call any more, as after an illegal access; another takes what is left


class Draw(random.Random):
    """Choices and tensors of one case."""

    def __init__(self, kind: str, seed: int, device: str) -> None:
        super().__init__(zlib.crc32(kind.encode()) * 1_000_003 + seed)
        self.generator = torch.Generator().manual_seed(self.randrange(1 << 62))
        self.device, self.small = ("cuda" if device == "cuda" else "cpu"), device != "cuda"

    def within(self, dtype: torch.dtype, products: bool = False) -> torch.dtype:
        """The dtype in which what comes between is rounded: fp32 in kernels, but for matrix products of bf16; plain torch's results all are."""
        kernels = self.device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        return torch.float32 if kernels and not (products and dtype == torch.bfloat16) else dtype

    def size(self, *large: int, small: Sequence[int] = (1, 2, 3, 5, 7, 8, 16, 17)) -> int:
        """One of the small sizes, or on a GPU one of the large ones."""
        return self.choice([*small, *(() if self.small else large * 2)])

    def chance(self, share: float) -> bool:
        return self.random() < share

    def magnitude(self, low: float = -8, high: float = 8, share: float = 0.4) -> float:
        """1, or at times a power of ten."""
        return 10 ** self.uniform(low, high) if self.chance(share) else 1.0

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def dtype(self, interpreter: bool = False) -> torch.dtype:
        return self.choice([torch.float32, torch.float32, torch.float16, *([] if interpreter else [torch.bfloat16])])

    def starts(self, B: int, T: int) -> Tensor | None:
        """Where documents start: nowhere, rarely, often, or at the very first and last steps."""
        kind = self.choice(["none", "rare", "often", "ends"])
        if kind == "none":
            return None
        flags = self.rand(B, T) < {"rare": 0.05, "often": 0.5, "ends": 0.0}[kind]
        if kind == "ends" and T:
            flags[:, [0, -1]] = True
        return flags

    def laid(self, x: Tensor) -> Tensor:
        """The same values as they may lie in memory: dense, columns of a wider tensor, shifted by an element, or with time first."""
        kind = self.choice(["dense", "dense", "columns", "shifted", "time first"])
        if kind in ("columns", "shifted") and x.ndim > 1:
            before = 16 if kind == "columns" else 1
            wide = torch.cat([x.new_full((*x.shape[:-1], before), 1e3), x, x.new_full((*x.shape[:-1], 2 * before), 1e3)], -1)
            return wide[..., before : before + x.shape[-1]]
        if kind == "time first" and x.ndim > 2:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return x


@dataclass
class Answers:
    """Answers by name: found, in float64, and of the fp32 loop; `description` is the case's sizes. `coarse`: more may be lost where operands
    in 16 bits are multiplied; `within`: the dtype in which what comes between is rounded."""

    found: dict[str, Tensor]
    wanted: dict[str, Tensor]
    loop: dict[str, Tensor]
    description: str
    coarse: float = 1.0
    within: torch.dtype = torch.float32


@dataclass
class Result:
    """What one case has shown; `group`: under which name the table counts it, the kind if empty."""

    kind: str
    seed: int
    device: str
    ok: bool
    group: str = ""
    description: str = ""
    worst: str = ""  # the answer that is nearest to its bound
    share: float = 0.0  # of its bound
    error: str = ""
    seconds: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)  # what else a generator reports


def loss(computed: Tensor, wanted: Tensor, narrow: bool) -> float:
    """The largest error relative to its row; of answers in 16 bits, whose rounding is relative to each value, that of all together."""
    computed, wanted = computed.detach().double().cpu(), wanted.detach().double().cpu()
    fine = torch.isfinite(wanted)
    gap, size = torch.where(fine, computed - wanted, 0.0).abs(), torch.where(fine, wanted, 0.0).abs()
    if not gap.numel() or not size.any():
        return float(gap.max()) if gap.numel() else 0.0
    if not torch.isfinite(gap).all():
        return float("inf")
    if narrow or gap.ndim == 0:
        most = size.max().clamp(min=ZERO)
        return float((gap / most).norm() / (size / most).norm().clamp(min=1.0))
    rows = size.amax(-1, keepdim=True).clamp(min=max(ROW * float(size.max()), ZERO))
    return float((gap / rows).max())


def judged(answers: Answers) -> tuple[str, float, str]:
    """(the answer nearest to its bound, its share of the bound, what is wrong or '')."""
    worst, most, problems = "", 0.0, []
    for name, wanted in answers.wanted.items():
        found, loop = answers.found[name], answers.loop[name]
        if found.shape != wanted.shape:
            return name, float("inf"), f"{name} is {tuple(found.shape)}, not {tuple(wanted.shape)}"
        narrow = {found.dtype, answers.within} & {torch.float16, torch.bfloat16} != set()
        lost = ~torch.isfinite(wanted)
        if lost.any() and torch.isfinite(found.cpu())[lost.cpu()].any():
            problems.append(f"{name} is finite where float64 is not")
        rounding = loss(wanted.to(found.dtype), wanted, narrow) if narrow else 0.0
        if answers.within != torch.float32:
            rounding = max(rounding, torch.finfo(answers.within).eps)
        bound = answers.coarse * (LOOPS * loss(loop, wanted, narrow) + ROUNDINGS * rounding + FLOOR)
        error = loss(found, wanted, narrow)
        if error / bound >= most:
            worst, most = name, error / bound
        if error > bound:
            problems.append(f"{name} is off by {error:.1e}; the loop by {loss(loop, wanted, narrow):.1e}, the bound is {bound:.1e}")
    return worst, most, "; ".join(problems)


def line(module: str, kind: str, seed: int, device: str) -> str:
    return f"python -m {module} {kind} {seed} --device {device}"


def run_one(make: Callable[[Draw], Answers], kind: str, seed: int, device: str) -> Result:
    start, result = time.monotonic(), Result(kind, seed, device, False)
    try:
        answers = make(Draw(kind, seed, device))
        result.description = answers.description
        result.worst, result.share, result.error = judged(answers)
        result.ok = not result.error
    except Exception as problem:  # any is a finding, told with the line that runs it again
        where = traceback.extract_tb(problem.__traceback__)[-1]
        result.error = f"{type(problem).__name__}: {str(problem)[:300]} ({Path(where.filename).name}:{where.lineno})"
    result.seconds = round(time.monotonic() - start, 2)
    return result


def cases(kinds: Sequence[str], count: int, seed: int) -> list[tuple[str, int]]:
    """So many cases, of all kinds in turn."""
    return [(kinds[i % len(kinds)], seed + i) for i in range(count)]


def known(out: Path, device: str) -> dict[tuple[str, int], Result]:
    """Results of this device that are there already: a run goes on where it stopped."""
    lines = out.read_text().splitlines() if out.exists() else []
    results = [Result(**json.loads(text)) for text in lines if text.startswith("{") and text.endswith("}")]
    return {(r.kind, r.seed): r for r in results if r.device == device}


def table(results: Sequence[Result], module: str) -> str:
    rows = [f"{'kind':<20}{'cases':>6}{'failed':>8}{'nearest to its bound':>22}{'slowest':>10}"]
    for group in dict.fromkeys(r.group or r.kind for r in results):
        mine = [r for r in results if (r.group or r.kind) == group]
        worst, slowest = max(r.share for r in mine), max(r.seconds for r in mine)
        means = {key: sum(r.numbers.get(key, 0.0) for r in mine) / len(mine) for key in mine[0].numbers}
        more = "".join(f"  {key} {mean:.3g}" for key, mean in means.items())
        rows.append(f"{group:<20}{len(mine):>6}{sum(not r.ok for r in mine):>8}{worst:>22.2f}{slowest:>9.1f}s{more}")
    rows += [f"FAILED {line(module, r.kind, r.seed, r.device)}\n    {r.description}\n    {r.error}" for r in results if not r.ok]
    return "\n".join(rows)


Run = Callable[[str, int, str], Result]  # of a kind, a seed and a device


def parsed(module: str, kinds: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("kind", nargs="?", choices=[*kinds])
    parser.add_argument("seed_of_case", nargs="?", type=int)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--cases", type=int, default=0, help="run so many, of all kinds in turn (or of KIND)")
    parser.add_argument("--seed", type=int, default=None, help="the first seed; drawn if not given")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no case is begun")
    parser.add_argument("--out", type=Path, default=None, help="JSON file; with it a run that stopped goes on")
    parser.add_argument("--jobs", type=int, default=1, help="processes, which compile kernels side by side; they need --out")
    parser.add_argument("--part", default=WHOLE, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_many(module: str, wanted: Sequence[tuple[str, int]], run: Run, given: argparse.Namespace) -> list[Result]:
    """The results of these cases, each written to FILE.jsonl as soon as it is there, but those that there is no time for."""
    out, began = given.out and given.out.with_suffix(".jsonl"), time.monotonic()
    done = known(out, given.device) if out else {}
    results = []
    for kind, number in wanted:
        result = done.get((kind, number))
        if result is None:
            if time.monotonic() - began >= given.seconds:
                continue
            result = run(kind, number, given.device)
            if out:
                with out.open("a") as file:
                    file.write("\n" + json.dumps(asdict(result)) + "\n")  # the line before may be torn
        if not result.ok:
            print(f"FAILED {line(module, kind, number, given.device)}: {result.error}", flush=True)
            if "illegal memory access" in result.error and given.part != WHOLE and not done.get((kind, number)):
                sys.exit(LOST)
        results.append(result)
    return results


def in_parts(command: Sequence[str], jobs: int, seconds: float) -> None:
    """Runs a process for each part of the cases; one that lost its GPU is replaced."""
    end = time.monotonic() + seconds

    def start(part: int) -> subprocess.Popen[bytes]:
        left = max(0.0, end - time.monotonic())
        return subprocess.Popen([*command, "--seconds", str(left), "--part", f"{part}/{jobs}"], stdout=subprocess.DEVNULL)

    running = {part: start(part) for part in range(jobs)}
    while running:
        for part, process in list(running.items()):
            if process.poll() is not None:
                del running[part]
                if process.returncode == LOST:
                    running[part] = start(part)
        time.sleep(0.2)


def main(module: str, kinds: Sequence[str], run: Run, usable: Callable[[str, str], bool], every: bool = False) -> int:
    """The command line: one case by kind and seed, or many with --cases. Returns the number of failures.

    usable: whether a kind is among those of --cases on a device. every: --cases counts seeds, each of which is run in every kind."""
    given = parsed(module, kinds)
    if given.device == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.kernels.interpreter import patch_once

        patch_once()
    if given.kind is not None and given.seed_of_case is not None:
        result = run(given.kind, given.seed_of_case, given.device)
        print(json.dumps(asdict(result), indent=1))
        return int(not result.ok)
    seed = random.SystemRandom().randrange(1 << 30) if given.seed is None else given.seed
    chosen = [given.kind] if given.kind else [kind for kind in kinds if usable(kind, given.device)]
    wanted = [(kind, seed + i) for i in range(given.cases) for kind in chosen] if every else cases(chosen, given.cases, seed)
    if given.jobs > 1 and given.out:
        words = [sys.executable, "-m", module, *([given.kind] if given.kind else []), "--device", given.device, "--cases", str(given.cases)]
        in_parts([*words, "--seed", str(seed), "--out", str(given.out)], given.jobs, given.seconds)
        given.seconds = 0.0  # what they had no time for stays undone
    part, parts = map(int, given.part.split("/"))
    results = run_many(module, wanted[part::parts], run, given)
    failed = sum(not r.ok for r in results)
    if parts == 1:
        print(table(results, module))
        print(f"seed {seed}: {failed} of {len(results)} cases failed")
        if given.out:
            name = torch.cuda.get_device_name() if given.device == "cuda" else given.device
            whole = {"seed": seed, "device": name, "torch": torch.__version__, "cases": len(results), "failed": failed}
            write_json(given.out, {**whole, "results": [asdict(r) for r in results]})
    return failed
