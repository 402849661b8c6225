"""How the ranks of a run are doing: signs of life and stacks for the supervisor; times and memory of every rank for the log."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.result import StepResult
    from training.world import World

FOLDER = "EVERYWHEN_RANKS"  # set by training/supervisor.py
BEAT_SECONDS = 0.5  # a file a rank is written at most this often


class SignOfLife:
    """rank-XXXXX.json of this rank (host, process id, last step, last saved step), and its stacks on SIGUSR2.

    The handler is faulthandler's: it writes from the signal itself, so a rank that hangs inside a collective still answers:
    `kill -USR2 PID` and read rank-XXXXX.stacks.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        folder = Path(os.environ.get(FOLDER) or run_dir / "ranks")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank:05d}.json"
        self.row: dict[str, object] = {"host": socket.gethostname(), "pid": os.getpid(), "step": None, "saved": None}
        self.last = 0.0
        self.stacks = self.path.with_suffix(".stacks").open("w")
        faulthandler.register(signal.SIGUSR2, self.stacks, all_threads=True)
        self._write()

    def beat(self, step: int, saved: int) -> None:
        """Says that this rank has finished `step` and that the newest checkpoint is of step `saved`."""
        new = saved != self.row["saved"] or self.row["step"] is None
        self.row |= {"step": step, "saved": saved}
        if new or time.monotonic() - self.last > BEAT_SECONDS:
            self._write()

    def _write(self) -> None:
        self.last = time.monotonic()
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(self.row))
            os.replace(temporary, self.path)
        except OSError:
            pass  # a full disk must not end a run here; a save says so in its own words

    def close(self, stopped: bool = False) -> None:
        """stopped: before its end, on request and with everything saved, which the supervisor takes for no failure."""
        if stopped:
            self.row |= {"stopped": True}
            self._write()
        faulthandler.unregister(signal.SIGUSR2)
        self.stacks.close()


class RankWatch:
    """Times and memory of every rank, gathered by one small collective each `every` steps."""

    COLUMNS = ("own_seconds", "communication", "data_wait", "allocated_gib", "reserved_gib", "peak_gib")
    SOLVE = ("tiles", "residual", "corrections", "sequential", "sequential_backward")

    def __init__(self, world: World, every: int) -> None:
        self.world, self.every = world, every
        self.steps, self.times = 0, [0.0, 0.0, 0.0]
        self.seconds = 0.0

    def step(self, step: int, result: StepResult, waited: float) -> dict[str, Any]:
        """Adds a step; at intervals returns what metrics.jsonl is to say of the ranks, means over the interval, else {}.

        own_seconds: of a step, communication left out. The slowest rank is the one with the most of it; the others wait for it.
        solve_*: the certificate of nonlinear recurrences solved over time slices on a GPU, the worst of all ranks, layers and steps.
        """
        from kernels.parallel_rnn import last_report
        from training.watch.metrics import memory_gib

        self.steps += 1
        self.seconds += result.seconds + waited
        own_seconds = result.seconds + waited - result.communication
        self.times = [a + b for a, b in zip(self.times, (own_seconds, result.communication, waited))]
        if step % self.every:
            return {}
        solve = last_report()
        rows = self.world.gather(
            [*(t / self.steps for t in self.times), *memory_gib(self.world.device), *(solve[name] for name in self.SOLVE)]
        )
        solves = {name: max(row[len(self.COLUMNS) + i] for row in rows) for i, name in enumerate(self.SOLVE)}
        columns = {name: [round(row[i], 6) for row in rows] for i, name in enumerate(self.COLUMNS)}
        by_rank = columns["own_seconds"]
        slowest = max(range(len(by_rank)), key=lambda rank: by_rank[rank])
        share = sum(columns["communication"]) / len(rows) * self.steps / self.seconds if self.seconds else 0.0
        self.steps, self.times, self.seconds = 0, [0.0, 0.0, 0.0], 0.0
        return {
            "slowest_rank": slowest,
            "slowest_ratio": by_rank[slowest] / median(by_rank) if median(by_rank) > 0 else 1.0,
            "communication_share": share,
            **{key: max(columns[key]) for key in ("allocated_gib", "reserved_gib", "peak_gib")},
            **({f"solve_{name}": solves[name] for name in self.SOLVE[1:]} if solves["tiles"] else {}),
            "ranks": columns,
        }
