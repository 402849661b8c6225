"""Training over several GPUs of one host: scaling under ZeRO, sequence parallelism, equal losses, resuming on fewer GPUs, a killed rank.

    python -m scripts.bench.multi_gpu [gpus=2] [--seconds 1800] [parts=zero,sequence,resume,kill] [sizes=400m,1b] [out=docs/results/multi_gpu]
    python -m scripts.bench.multi_gpu draw=true [out=...]        # plots and the table, from the rows alone
    python -m scripts.bench.multi_gpu toy=true gpus=2 out=DIR    # the same program in small, on CPU ranks

gpus: how many of the host's; run it for 2, 4 and 8 with the same `out`, each has its own baseline on one GPU in the same call.
    zero       ZeRO 1, 2, 3 of four models: tokens/s a GPU, MFU, memory, efficiency against one GPU at the same micro-batch; and the losses
               of a 35M hybrid on the same samples on one GPU and on all
    sequence   one mixer layer at T = 131,072 and 1,048,576 cut over the GPUs: compared with one GPU, then time, memory, bytes received;
               then whole 400M models
    resume     a run on all GPUs goes on with fewer and another ZeRO stage
    kill       a rank is killed; the supervisor brings the run back
The most wanted cases come first, and one start serves all cases of a number of GPUs. Each row is in OUT/rows_N.jsonl and on the screen as soon
as it is measured; called again, the program measures what is not there yet. After --seconds, or a SIGTERM, it names what was not run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.files import write_bytes, write_json
from scripts.bench.multi_gpu_cases import Task, sequence, zero
from scripts.bench.multi_gpu_report import draw, line_of, summary
from training.config.arguments import parse_arguments, program
from training.errors import UserError
from training.supervisor import rank_files
from training.watch.metrics import environment

ROOT = Path(__file__).resolve().parents[2]

DEFAULTS: dict[str, Any] = {
    "gpus": 2, "seconds": 1800.0, "parts": "zero,sequence,resume,kill", "sizes": "400m,1b", "out": "docs/results/multi_gpu", "draw": False, "toy": False,
}  # fmt: skip
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "OMP_NUM_THREADS": "4", "WANDB_MODE": "disabled"}


def launcher(ranks: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]


class TimeIsUp(Exception):
    """The time of the whole bench is over."""


class Worker:
    """scripts/bench/multi_gpu_worker.py on `ranks` GPUs, started once; `run` hands it a case."""

    def __init__(self, ranks: int, environment: dict[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"everywhen-{ranks}-gpus-"))
        self.alive()
        self.cases_sent = 0
        with (self.folder / "said.txt").open("w") as said:
            self.process = subprocess.Popen(
                [*launcher(ranks), "-m", "scripts.bench.multi_gpu_worker", str(self.folder)],
                cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def alive(self) -> None:
        (self.folder / "alive").touch()

    def run(self, case: dict[str, Any], wait: Callable[[], None]) -> dict[str, Any] | None:
        """The row of a case, None when the worker died of it; `wait` is called all the time and may raise TimeIsUp."""
        row = self.folder / f"row-{self.cases_sent:05d}.json"
        write_json(self.folder / f"case-{self.cases_sent:05d}.json", case)
        self.cases_sent += 1
        while not row.exists():
            if self.process.poll() is not None:
                return None
            wait()
        return dict(json.loads(row.read_text()))

    def said(self) -> str:
        """The end of what the ranks said, which torchrun's report fills, and the first exception in it."""
        text = (self.folder / "said.txt").read_text(errors="replace")
        raised = re.search(r"^(\[rank\d+\]: *)?[\w.]*(Error|Exception)\b.*", text, re.MULTILINE)
        return text[-1500:] + (f"\n{raised[0][:1000]}" if raised else "")

    def close(self) -> None:
        (self.folder / "end").touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        self.kill()

    def kill(self) -> None:
        """Ends the ranks too: torchrun passes a TERM on, and kills what does not listen; what outlives it ends by missing `alive`."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Bench:
    """What the parts share: the settings, the end of the time, the rows there are, and a worker for each number of GPUs."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.gpus, self.toy, self.sizes = values["gpus"], values["toy"], values["sizes"].split(",")
        self.end = time.monotonic() + values["seconds"]
        self.out = Path(values["out"])
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / f"rows_{self.gpus}.jsonl"
        self.about = environment(torch.device("cpu" if self.toy else "cuda"))
        self.device = self.about["device"]
        self.environment = {**ENVIRONMENT, **os.environ, **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if self.toy else {})}
        rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        self.rows = [row for row in rows if "error" not in row and "not_run" not in row]
        others = sorted({row["device"] for row in self.rows if row["device"] != self.device})
        if others:
            raise UserError(f"{self.file} was measured on {others[0]}, and this is {self.device}; give another folder with out=.")
        self.workers: dict[int, Worker] = {}
        self.silent: dict[int, int] = {}  # how many workers in a row died without a single row

    def left(self) -> float:
        return self.end - time.monotonic()

    def stop(self, *_: object) -> None:
        self.end = time.monotonic()

    def wait(self) -> None:
        """A moment. Raises TimeIsUp."""
        for worker in self.workers.values():
            worker.alive()
        if self.left() <= 0:
            raise TimeIsUp
        time.sleep(0.02)

    def add(self, **row: Any) -> None:
        self.rows.append({"gpus": self.gpus, "device": self.device, "commit": self.about["commit"], **row})
        write_bytes(self.file, "".join(json.dumps(one) + "\n" for one in self.rows).encode())
        if "not_run" not in row:  # the table at the end names cases without a row
            print(line_of(self.rows[-1], self.rows), flush=True)

    def has(self, part: str, name: str, gpus: int) -> bool:
        return any((row["part"], row.get("id"), row["gpus"]) == (part, name, gpus) and "error" not in row for row in self.rows)

    def worker(self, ranks: int) -> Worker:
        if ranks not in self.workers:
            self.workers[ranks] = Worker(ranks, self.environment)
        return self.workers[ranks]

    def case(self, ranks: int, case: dict[str, Any]) -> None:
        """Measures one case, in a new worker when the one before has failed. Raises TimeIsUp."""
        if self.silent.get(ranks, 0) >= 2:
            raise RuntimeError(f"not tried: workers on {ranks} GPU(s) fail from the start")
        worker = self.worker(ranks)
        row = worker.run(case | ({"vocabulary": 512} if self.toy else {}), self.wait)
        if row is not None:
            self.silent[ranks] = 0
            self.add(**row)
            return
        self.silent[ranks] = self.silent.get(ranks, 0) + (worker.cases_sent == 1)
        said = worker.said()
        worker.kill()
        del self.workers[ranks]
        raise RuntimeError(said)

    def run(self, command: list[str]) -> None:
        """Raises TimeIsUp, or RuntimeError with the end of what the command said when it failed."""
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while process.poll() is None:
                    self.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            said.seek(0)
            if process.returncode:
                raise RuntimeError(said.read()[-1500:])

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close() if self.left() > 0 else worker.kill()


def small_run(bench: Bench, name: str, folder: Path, ranks: int, steps: int, *more: str) -> list[str]:
    """A tiny hybrid on the demo text through train.py itself."""
    return [
        *(*launcher(ranks), "train.py", "experiment=smoke", "model=hybrid", f"data.path={folder / 'data'}", f"run_dir={folder / name}"),
        *(
            f"train.steps={steps}",
            "train.global_batch=8",
            "train.micro_batch=1",
            "schedule=constant",
            "schedule.warmup=5",
            "eval=end",
            "eval.tokens=256",
        ),
        *("eval.sample_tokens=1", "train.log_every=100", *more),
    ]


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def furthest(one: dict[int, float], other: dict[int, float]) -> float:
    assert one.keys() == other.keys(), (len(one), len(other))
    return max(abs(other[step] - one[step]) / one[step] for step in one)


def prepared(bench: Bench, folder: Path) -> int:
    """Token shards and the run that is left alone, unless they are there; returns its steps."""
    steps = 40 if bench.toy else 100
    if not (folder / "data").exists():
        prepare = ["-m", "data.prepare", "input=demo", f"out={folder / 'data'}", "tokenizer=bpe:512", "limit_docs=4", "valid_fraction=0.3"]
        alone = small_run(bench, "alone", folder, bench.gpus, steps, "deepspeed=zero2", f"checkpoint.milestones=[{steps // 2}]")
        for command in ([sys.executable, *prepare], alone):
            bench.run(command)
    return steps


def resume(bench: Bench, folder: Path, ranks: int) -> None:
    """From the middle of the run on all GPUs, on `ranks` of them."""
    steps = prepared(bench, folder)
    middle = folder / "alone" / "checkpoints" / f"step-{steps // 2:08d}"
    moved = small_run(bench, f"on{ranks}", folder, ranks, steps, "deepspeed=zero1", f"train.resume={middle}", "checkpoint.at_end=false")
    bench.run(moved)
    other = losses(folder / f"on{ranks}")
    one = {step: loss for step, loss in losses(folder / "alone").items() if step > steps // 2}
    bench.add(part="resume", id=f"on {ranks}, ZeRO 2 to 1", steps=len(one), largest_relative_difference=furthest(one, other))


def kill(bench: Bench, folder: Path) -> None:
    steps = prepared(bench, folder)
    options = ["restarts=3", "timeout=120", "backoff=0.2", "grace=5"]
    job = small_run(bench, "killed", folder, bench.gpus, steps, "deepspeed=zero2", f"checkpoint.every={steps // 10}")
    command = [sys.executable, "-m", "training.supervisor", *options, "--", *job]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=bench.environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        ranks, kills = folder / "killed" / "supervisor", 0
        try:
            while process.poll() is None:
                bench.wait()
                rank_rows = [row for _, row in rank_files(ranks) if row.get("pid")]
                if not kills and max((row.get("step") or 0 for row in rank_rows), default=0) >= steps // 3:
                    os.kill(random.Random(0).choice(rank_rows)["pid"], signal.SIGKILL)
                    kills += 1
        finally:
            if process.poll() is None:
                process.terminate()  # the supervisor ends what it has started
                process.wait()
        said.seek(0)
        if process.returncode:
            raise RuntimeError(said.read()[-1500:])
    notes = [json.loads(line)["what"] for line in (ranks / "supervisor.jsonl").read_text().splitlines()]
    one, other = losses(folder / "alone"), losses(folder / "killed")
    bench.add(
        part="kill",
        id="a rank killed",
        kills=kills,
        notes=notes,
        largest_relative_difference=furthest(one, other),
        equal_bit_for_bit=one == other,
    )


def tasks(bench: Bench, parts: list[str], folder: Path) -> list[tuple[str, str, int, Callable[[], None]]]:
    """(part, id, GPUs, what measures it) of all parts asked for, the most wanted first."""
    cases: list[Task] = []
    cases_of = {"zero": zero(bench.gpus, bench.toy, bench.sizes), "sequence": sequence(bench.gpus, bench.toy)}
    for depth in range(3):
        for part in ("zero", "sequence"):
            cases += cases_of[part][depth] if part in parts else []
    result: list[tuple[str, str, int, Callable[[], None]]] = [
        (case["part"], case["id"], ranks, functools.partial(bench.case, ranks, case)) for ranks, case in cases
    ]
    if "resume" in parts:
        for n in [n for n in (4, 2, 1) if n < bench.gpus][:2]:
            result.append(("resume", f"on {n}, ZeRO 2 to 1", bench.gpus, functools.partial(resume, bench, folder, n)))
    if "kill" in parts:
        result.append(("kill", "a rank killed", bench.gpus, lambda: kill(bench, folder)))
    return result


def measure(bench: Bench, parts: list[str]) -> None:
    """Runs what is not there yet until the time is up."""
    with tempfile.TemporaryDirectory(prefix="everywhen-multi-gpu-") as folder:
        todo = [task for task in tasks(bench, parts, Path(folder)) if not bench.has(*task[:3])]
        for ranks in sorted({ranks for part, _, ranks, _ in todo[:2] if part in ("zero", "sequence")}):
            bench.worker(ranks)  # both import while the first case is read
        try:
            for number, (part, name, ranks, act) in enumerate(todo):
                if part in ("resume", "kill"):  # they start processes of their own, for which the GPUs are to be free
                    bench.close()
                    bench.workers.clear()
                try:
                    act()
                except TimeIsUp:
                    for i, (part, name, ranks, _) in enumerate(todo[number:]):
                        bench.add(part=part, id=name, gpus=ranks, not_run="cut off as the time was up" if not i else "no time left")
                    return
                except (RuntimeError, OSError, AssertionError) as error:  # the others do not depend on it
                    bench.add(part=part, id=name, gpus=ranks, error=str(error))
        finally:
            bench.close()


def main(words: list[str]) -> int:
    values = parse_arguments(words, DEFAULTS)
    if not values["draw"]:
        parts = values["parts"].split(",")
        unknown = [part for part in parts if part not in ("zero", "sequence", "resume", "kill")]
        if unknown:
            raise UserError(f"There is no part {unknown[0]!r}; choose of zero,sequence,resume,kill.")
        if values["gpus"] < 2:
            raise UserError("gpus=1 has nothing to compare with; give 2 or more.")
        if not values["toy"] and torch.cuda.device_count() < values["gpus"]:
            raise UserError(
                f"There are {torch.cuda.device_count()} GPU(s) here, not {values['gpus']}; give gpus=N, or toy=true for CPU ranks."
            )
        bench = Bench(values)
        signal.signal(signal.SIGTERM, bench.stop)
        write_json(bench.out / f"environment_{bench.gpus}.json", bench.about)
        measure(bench, parts)
    print("\n".join(["", *summary(Path(values["out"]))]))
    draw(Path(values["out"]))
    return 0


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
