"""`profile=true`: a torch trace of some steps and a snapshot of the device's memory, a file of each for every rank, in run_dir/profile.

docs/observability.md tells how to open and read them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ALLOCATIONS = 200_000  # newest allocations and frees that a snapshot remembers


class Tracer:
    """Traces `steps` optimizer steps from step `start` (counted from 1) on; does nothing where `enabled` is false."""

    def __init__(
        self, enabled: bool, run_dir: Path, rank: int, device: torch.device, start: int, steps: int, say: Callable[[str], None]
    ) -> None:
        self.first, self.last = (start, start + steps - 1) if enabled else (0, 0)
        self.folder, self.rank, self.device, self.say = run_dir / "profile", rank, device, say
        self.profiler: Any = None

    def before(self, step: int) -> None:
        """Called before `step` is taken."""
        if self.profiler is not None or not self.first <= step <= self.last:
            return
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        self.profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self.profiler.start()

    def after(self, step: int) -> None:
        """Called when `step` is taken; after the last one, writes the files."""
        if self.profiler is not None and step >= self.last:
            self.close()

    def close(self) -> None:
        """Writes what there is, if a trace is running."""
        if self.profiler is None:
            return
        profiler, self.profiler, cuda = self.profiler, None, self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        profiler.stop()
        self.first = self.last = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / f"trace-rank{self.rank:05d}.json.gz"))
            order = "self_device_time_total" if cuda else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=40)
            (self.folder / f"operations-rank{self.rank:05d}.txt").write_text(table)
            if cuda:
                torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-rank{self.rank:05d}.pickle"))
            self.say(f"profile written to {self.folder}")
        except (OSError, RuntimeError) as error:  # a profile that cannot be written must not end the run
            self.say(f"The profile could not be written ({str(error).splitlines()[0]}); training goes on.")
        finally:
            if cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
