"""What a run says: a line for people (log.txt keeps them), metrics.jsonl for programs, and wandb or TensorBoard where asked. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from data.errors import reason_of
from data.files import finite
from training.config.schema import Config
from training.cost.flops import device_name, peak_flops

if TYPE_CHECKING:
    from training.result import StepResult


def peak_memory_gib(device: torch.device) -> float:
    """High-water mark: device memory on a GPU, resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_gib(device: torch.device) -> tuple[float, float, float]:
    """(allocated, reserved, peak): of torch's allocator on a GPU; resident memory now, the same, and its high-water mark on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30, torch.cuda.memory_reserved(device) / 2**30, peak_memory_gib(device)
    resident = psutil.Process().memory_info().rss / 2**30
    return resident, resident, peak_memory_gib(device)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and command: what another person needs to run the same thing."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    root, program = Path(__file__).resolve().parents[2], Path(sys.argv[0]).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    return {
        "command": [str(program.relative_to(root)) if program.is_relative_to(root) else sys.argv[0], *sys.argv[1:]],
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": git("status", "--porcelain") not in ("", "unknown"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: installed(package) for package in ("triton", "deepspeed", "transformers")},
        "device": device_name(device),
        "device_type": device.type,
        "cpu_threads": torch.get_num_threads(),
    }


def duration(seconds: float) -> str:
    minutes, s = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


class Metrics:
    """Collects the steps of a run; on other ranks than 0 every method does nothing."""

    def __init__(self, run_dir: Path, config: Config, device: torch.device, world_size: int, flops_per_token: int, main: bool) -> None:
        self.run_dir, self.config, self.device, self.main = run_dir, config, device, main
        self.flops_per_token, self.world_size = flops_per_token, world_size
        self.again_per_token = 0  # FLOPs that are made a second time, which HFU counts and MFU does not
        self.peak = peak_flops(device_name(device), config.train.precision)
        self.rate: float | None = None
        self.wandb_id: str | None = None
        self.wandb: Any = None
        self.tensorboard: Any = None
        self.file: Any = None
        self.unwritten = 0
        self.lost: dict[str, str] = {}
        self.compiling = config.train.compile

    def open(self, step: int, wandb_id: str | None) -> None:
        """Opens the sinks at `step`; what metrics.jsonl says of later steps belongs to a lost branch and is dropped."""
        self.wandb_id = wandb_id
        if not self.main:
            return
        path = self.run_dir / "metrics.jsonl"
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if _row_step(line) <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(row + "\n" for row in rows))
            os.replace(temporary, path)
        self.file = path.open("a", buffering=1)
        self._open_services(step)

    def _open_services(self, step: int) -> None:
        log = self.config.logging
        if log.wandb != "disabled":
            try:
                self._open_wandb(log.wandb)
            except Exception as error:  # a logging service must not cost a run; metrics.jsonl has everything
                try:
                    self._open_wandb("offline")
                    then = f"logging into {self.run_dir / 'wandb'}, which `wandb sync` uploads later"
                except Exception:
                    then = "going on with metrics.jsonl alone"
                self.say(f"wandb is not available ({type(error).__name__}: {str(error).splitlines()[0]}); {then}.")
        if log.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step + 1)
            except ImportError:
                self.say("TensorBoard is not installed (pip install 'everywhen[tensorboard]'); going on without it.")

    def _open_wandb(self, mode: Any) -> None:
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds in which a service that can be reached answers
        import wandb

        self.wandb = wandb.init(
            project=self.config.logging.wandb_project,
            entity=self.config.logging.wandb_entity,
            name=self.config.name,
            id=self.wandb_id,
            resume="allow",
            mode=mode,
            dir=str(self.run_dir),
            settings=wandb.Settings(silent=True),
        )
        self.wandb_id = self.wandb.id

    def say(self, text: str) -> None:
        """A line for people, on the terminal and with its time in log.txt of the run folder."""
        if not self.main:
            return
        print(text, flush=True)
        with contextlib.suppress(OSError), (self.run_dir / "log.txt").open("a", encoding="utf-8") as file:
            file.writelines(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n" for line in text.splitlines())

    def write(self, step: int, **values: Any) -> None:
        """One row of metrics.jsonl, and the same to the other sinks."""
        if not self.main:
            return
        try:
            self.file.write(json.dumps(finite({"step": step, **values})) + "\n")
        except OSError as error:  # rank 0 must not end alone here; a checkpoint that cannot be written ends all in a sentence
            self.unwritten += 1
            if self.unwritten == 1:
                self.say(f"{self.run_dir / 'metrics.jsonl'} cannot be written ({error.strerror}); free space, or rows are lost.")
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if self.wandb is not None:
            try:
                self.wandb.log(numbers, step=step)
            except Exception as error:
                self.wandb = None
                self.say(
                    f"wandb failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0]}); going on with metrics.jsonl alone."
                )
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, step)

    def keep(self, name: str, write: Callable[[Path], Any]) -> None:
        """Has rank 0 write the file `name` of the run folder. What the disk does not take is told, and kept in `lost` for the end of the run: rank 0
        must not end alone."""
        if not self.main:
            return
        self.lost.pop(name, None)
        try:
            write(self.run_dir / name)
        except OSError as error:
            self.lost[name] = f"{self.run_dir / name} cannot be written: {reason_of(error)}."
            self.say(self.lost[name])

    def step(
        self, step: int, result: StepResult, lr: float, data_wait: float, ranks: dict[str, Any] | None = None, seen: int | None = None
    ) -> None:
        """Records optimizer step number `step`, from 1, and prints a line every `log_every`.

        data_wait: seconds that its batch was waited for; ranks: of observe.RankWatch, at intervals; seen: tokens of the run so far (else those of so
        many steps of the present batch).
        """
        if not self.main:
            return
        if self.compiling:
            self.compiling = False
            self.say(f"compiled: the first step took {duration(result.seconds)}.")
        rate = result.tokens / (result.seconds + data_wait)
        self.rate = rate if self.rate is None else 0.9 * self.rate + 0.1 * rate
        row = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": step * self.config.tokens_per_step if seen is None else seen,
            "tokens_per_second": rate,
            "seconds": result.seconds,
            "data_wait": data_wait,
            "mfu": rate * self.flops_per_token / (self.peak * self.world_size) if self.peak else None,
            "hfu": rate * (self.flops_per_token + self.again_per_token) / (self.peak * self.world_size) if self.peak else None,
            "memory_gib": peak_memory_gib(self.device),
        }
        self.write(step, **row, **({"skipped": result.skipped} if result.skipped else {}), **(ranks or {}))
        if step % self.config.train.log_every == 0 or step in (1, self.config.total_steps) or result.skipped:
            self.say(self._line(step, row, ranks) + (f"  SKIPPED: {result.skipped}" if result.skipped else ""))

    def _line(self, step: int, row: dict[str, Any], ranks: dict[str, Any] | None) -> str:
        """The line for people of a step whose row of metrics.jsonl is `row`."""
        total, wait, mfu = self.config.total_steps, row["data_wait"], row["mfu"]
        assert self.rate is not None
        eta = (total - step) * self.config.tokens_per_step / self.rate
        shown = "n/a" if mfu is None else f"{100 * mfu:.1f}%"
        line = (
            f"step {step:>{len(str(total))}}/{total}  loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}  lr {row['lr']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tok/s  MFU {shown}  data {100 * wait / (row['seconds'] + wait):.1f}%  "
            f"mem {row['memory_gib']:.2f}G  ETA {duration(eta)}"
        )
        if ranks and self.world_size > 1:
            share, slowest = 100 * ranks["communication_share"], ranks["slowest_rank"]
            line += f"  comm {share:.1f}%  slowest rank {slowest} ({ranks['slowest_ratio']:.2f}x)"
        walked = max(ranks.get(f"solve_{key}") or 0.0 for key in ("sequential", "sequential_backward")) if ranks else 0.0
        if walked:
            line += f"  WARNING: {100 * walked:.2g}% of the recurrences' tiles walked in order, which is slow (docs/parallel_solve.md)"
        return line

    def close(self) -> None:
        for sink in (self.file, self.tensorboard):
            if sink is not None:
                with contextlib.suppress(OSError):  # of a full disk, told before
                    sink.close()
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as error:
                self.say(f"wandb did not finish ({type(error).__name__}); metrics.jsonl has everything.")


def _row_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 1 << 62  # a torn last line


class Stopwatch:
    """Seconds between calls of `lap`."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        return passed
