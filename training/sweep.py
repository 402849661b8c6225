"""Sweeps: `python train.py -m optim.lr=1e-3,3e-3 model=paragru,mamba2` trains one run for each combination of the values.

Hydra expands the values and its launcher (one job after another; with `hydra/launcher=joblib` or a submitit one several at a time or on a
cluster) calls `job` for each. A job is train.py in a process of its own with a run folder of its own, SWEEP/KEY=VALUE__KEY=VALUE, where SWEEP is the
run_dir that the other arguments make. One that fails is told in the table at the end and does not keep the rest from being trained. The same
command again leaves out what is finished and goes on with what is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from data.files import write_bytes, write_json
from training.compare import Run, plot, read_run, rows_of, table
from training.errors import STOPPED, UserError, sentence_of
from training.launch import world_size

COMMAND = "SWEEP_COMMAND"  # environment: what starts a job instead of `python train.py`, e.g. 'torchrun --nproc_per_node 8 train.py'
FAILED = 1
RECORD = "job.json"
LONGEST = 200  # characters of a folder's name; file systems take 255 bytes
PR_SET_PDEATHSIG = 1


def quoted(text: str) -> str:
    """`text` as a value that Hydra reads back to the letter."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def label_of(overrides: list[str]) -> str:
    """The name of a job's folder: the overrides that tell it from the others, without characters that shells and file systems mind."""
    words = []
    for text in sorted(o.lstrip("+~") for o in overrides):
        key, _, value = text.partition("=")
        value = value[1:-1] if value[:1] == value[-1:] and value[:1] in ("'", '"') and len(value) > 1 else value
        words.append(f"{key}={re.sub(r'[^A-Za-z0-9._+-]+', '-', value).strip('-') or 'none'}")
    name = "__".join(words) or "all"
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class Sweep:
    """The sweep that a command line asks for. compose makes a config of overrides, check says whether it is that of a run; both raise UserError."""

    def __init__(
        self, words: list[str], flags: list[str], compose: Callable[[list[str]], DictConfig], check: Callable[[DictConfig], Any]
    ) -> None:
        self.words, self.flags, self.compose, self.check = words, flags, compose, check
        if world_size() > 1:
            raise UserError(
                f"A sweep starts its jobs itself: run python train.py -m without torchrun or deepspeed, and set {COMMAND}='torchrun ... train.py' "
                "for jobs of several ranks."
            )
        overrides = [_parsed(word) for word in words]
        self._plugins(overrides)
        self.swept = [o for o in overrides if o.is_sweep_override()]
        self.fixed = [o for o in overrides if not o.is_sweep_override() and not o.is_hydra_override()]
        self.discrete = all(o.is_discrete_sweep() for o in self.swept)
        if not self.discrete and not any(o.key_or_group == "hydra/sweeper" for o in overrides):
            raise UserError(
                "A range without steps needs a sweeper that chooses the values: hydra/sweeper=optuna (pip install hydra-optuna-sweeper)."
            )
        self.jobs = self._expand() if self.discrete else []
        base = self._base([o.input_line or "" for o in overrides if not o.is_sweep_override()])
        self.folder, self.dry = Path(base.run_dir), bool(base.dry_run)
        self._check()

    def _plugins(self, overrides: list[Override]) -> None:
        """Raises UserError for a launcher or sweeper that is not installed."""
        Plugins.instance()  # registers what there is
        for override in overrides:
            if override.key_or_group in ("hydra/launcher", "hydra/sweeper"):
                there = [name.removesuffix(".yaml") for name in ConfigStore.instance().list(override.key_or_group)]
                kind, name = override.key_or_group.partition("/")[2], str(override.value())
                if name not in there:
                    package = f"hydra-{name.split('_')[0]}-{kind}"
                    raise UserError(
                        f"There is no {override.key_or_group}={name}; here are {', '.join(there)} (pip install {package} may bring it)."
                    )

    def _base(self, fixed: list[str]) -> DictConfig:
        """What the jobs have in common; its run_dir is the folder of the sweep."""
        try:
            return self.compose(fixed)
        except UserError:  # of keys that a swept group brings
            return self.compose([*fixed, *(self.jobs[0] if self.jobs else [])])

    def _expand(self) -> list[list[str]]:
        """The swept overrides of each job."""
        jobs: list[list[str]] = [[]]
        for override in self.swept:
            values = [f"{override.get_key_element()}={text}" for text in override.sweep_string_iterator()]
            jobs = [[*job, value] for job in jobs for value in values]
        return jobs

    def _check(self) -> None:
        """Raises UserError for what is wrong with any of the jobs, before the first one starts."""
        fixed_words, jobs_by_problem = [o.input_line or "" for o in self.fixed], dict[str, list[str]]()
        for job in self.jobs:
            try:
                config = self.compose([*fixed_words, *job])
                if not os.environ.get(COMMAND):  # of how many ranks is not known here
                    self.check(config)
            except UserError as error:
                for problem in error.problems:
                    jobs_by_problem.setdefault(problem, []).append(" ".join(job))
        names = [label_of(job) for job in self.jobs]
        for name in sorted({n for n in names if names.count(n) > 1}):
            shared = f"{names.count(name)} jobs would share the run folder {name}; give each value once."
            jobs_by_problem.setdefault(shared, []).append(name)
        if jobs_by_problem:
            whole = len(self.jobs)
            raise UserError([p if len(jobs) == whole or jobs[0] in p else f"{p} (job {jobs[0]})" for p, jobs in jobs_by_problem.items()])

    def run(self, main: Callable[[], Any]) -> int:
        """Runs all jobs through Hydra, says how they came out, and returns the exit status: 0, 1 when a job failed, 75 when it was stopped."""
        if self.dry:
            with tempfile.TemporaryDirectory() as folder:  # of Hydra's own notes
                self.folder = Path(folder)
                return self._run(main)
        self.folder.mkdir(parents=True, exist_ok=True)
        return self._run(main)

    def _run(self, main: Callable[[], Any]) -> int:
        names = [label_of(job) for job in self.jobs]
        hydra_words = [
            f"hydra.sweep.dir={quoted(str(self.folder))}",
            "hydra.sweep.subdir=.",
            f"hydra.job.config.override_dirname.exclude_keys={self._fixed_keys()}",
        ]
        sys.argv[1:] = [*self.words, *hydra_words, *self.flags]
        write_json(self.folder / "sweep.json", {"jobs": names, "command": sys.argv})
        if not self.dry:
            print(f"sweep of {len(names) or 'some'} job(s) in {self.folder}", flush=True)
        began, stopped, status = time.time(), False, 0
        previous = signal.signal(signal.SIGTERM, _stop)
        try:
            main()
        except KeyboardInterrupt:
            stopped = True
        except SystemExit as end:  # Hydra has said why a launcher or sweeper gave up
            status = int(bool(end.code))
        finally:
            signal.signal(signal.SIGTERM, previous)
        return status if self.dry else max(status, self._report(names, began, stopped))

    def _fixed_keys(self) -> str:
        return "[" + ",".join(quoted(o.get_key_element().lstrip("+~")) for o in self.fixed) + "]"

    def _report(self, names: list[str], began: float, stopped: bool) -> int:
        if not names:
            names = sorted(p.parent.name for p in self.folder.glob(f"*/{RECORD}") if p.stat().st_mtime >= began - 1)
        runs = [_outcome(self.folder / name) for name in names]
        text = "\n".join(table(runs))
        problem = plot(runs, self.folder / "sweep.png")
        write_bytes(self.folder / "sweep.txt", (text + "\n").encode())
        print(f"\n{text}\n{problem or 'plot: ' + str(self.folder / 'sweep.png')}", flush=True)
        if stopped or any(run.status == "stopped" for run in runs):
            print("stopped; the same command goes on from there", flush=True)
            return STOPPED
        return 0 if all(run.status == "finished" for run in runs) else FAILED


def _parsed(word: str) -> Override:
    return OverridesParser.create().parse_overrides([word])[0]


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _outcome(folder: Path) -> Run:
    run, record = read_run(folder), _record(folder)
    run.status = str(record.get("status", "not started"))
    run.said = str(record.get("said", "")) if run.status == "failed" else ""
    return run


def _record(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


# What a launcher calls, in whatever process it likes.


def job(composed: DictConfig, trainer: Path) -> float:
    """Runs the program `trainer` in its own process on the config that Hydra composed. Returns the run's held-out bits per byte, or its
    loss where nothing is held out; infinity where it failed."""
    hydra = HydraConfig.get()
    fixed_keys = set(hydra.job.config.override_dirname.exclude_keys)
    overrides = list(hydra.overrides.task)
    swept = [o for o in overrides if o.partition("=")[0].lstrip("+~") not in fixed_keys]
    names_folder = any(o.startswith("run_dir=") for o in swept)
    label = label_of(swept)
    folder = Path(composed.run_dir) if names_folder else Path(hydra.sweep.dir) / label
    name = composed.name if any(o.startswith("name=") for o in swept) else f"{composed.name}-{label}"
    arguments = [o for o in overrides if not o.startswith(("run_dir=", "name="))]
    arguments += [f"run_dir={quoted(str(folder))}", f"name={quoted(str(name))}", *_flags(hydra)]
    if composed.dry_run:
        print(f"== {label}", flush=True)
        subprocess.run([*_command(trainer), *arguments], check=False)
        return 0.0
    one = _Job(composed, folder, label, int(hydra.job.num), "BasicLauncher" not in str(hydra.launcher.get("_target_")))
    try:
        return one.run([*_command(trainer), *arguments])
    except OSError as error:  # raised here, it would end the sweep
        one.say(f"error: {sentence_of(error)}")
        return math.inf


def _flags(hydra: Any) -> list[str]:
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    return [
        *(f"--config-dir={folder}" for folder in folders),
        *([f"--config-name={hydra.job.config_name}"] if hydra.job.config_name != "train" else []),
    ]


def _command(trainer: Path) -> list[str]:
    if os.environ.get(COMMAND):
        return [str(trainer) if word == trainer.name else word for word in shlex.split(os.environ[COMMAND])]
    return [sys.executable, str(trainer)]


class _Job:
    """One run of a sweep and its record, job.json. beside: other jobs run at the same time, so that lines say whose they are."""

    def __init__(self, composed: DictConfig, folder: Path, label: str, number: int, beside: bool) -> None:
        self.folder, self.label, self.number = folder, label, number
        self.mark = f"[{number + 1}] " if beside else ""
        self.config: dict[str, Any] = json.loads(json.dumps(OmegaConf.to_container(composed, resolve=True), default=str))
        self.last = ""

    def say(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # whoever read along has gone; job.log has it all
            print(self.mark + text, flush=True)

    def keep(self, status: str, **more: Any) -> None:
        write_json(self.folder / RECORD, {"status": status, "label": self.label, **more, "config": self.config})

    def run(self, command: list[str]) -> float:
        self.folder.mkdir(parents=True, exist_ok=True)
        before = _record(self.folder)
        if before.get("status") == "finished" and before.get("config") == self.config:
            self.say(f"== job {self.number + 1}, {self.label}: finished before")
            return self.result()
        self.say(f"== job {self.number + 1}, {self.label}: run folder {self.folder}")
        self.keep("running")
        try:
            with _own_gpu(self.folder.parent) as environment:
                status = self.watch(command, environment)
        except KeyboardInterrupt:
            self.keep("stopped")
            raise
        if status == 0 and self.steps() >= self.total():
            self.keep("finished")
            return self.result()
        if status in (0, STOPPED):
            self.keep("stopped")
            return self.result()
        self.keep("failed", said=self.last or f"ended with status {status}")
        self.say(f"== job {self.number + 1}, {self.label}: failed with status {status}")
        return math.inf

    def watch(self, command: list[str], environment: dict[str, str]) -> int:
        """Runs the command and passes its lines on; an interrupt reaches it once, and is waited for while it saves. Returns its status."""
        libc = ctypes.CDLL(None)

        def with_parent() -> None:  # a launcher that ends its workers by force does not know of their children
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        with (self.folder / "job.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                start_new_session=True, preexec_fn=with_parent,
            )  # fmt: skip
            try:
                self.relay(process, log)
                return process.wait()
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)
                try:
                    self.relay(process, log)
                    process.wait()
                except BaseException:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                raise

    def relay(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            self.say(line.rstrip("\n"))
            self.last = line.strip().removeprefix("error: ") or self.last

    def total(self) -> int:
        from training.config.schema import Config, parse

        config = parse(self.config, Config, "", [])
        return int(config.total_steps)

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return max((row["step"] for row in rows_of(path)), default=0) if path.is_file() else 0

    def result(self) -> float:
        run = read_run(self.folder)
        values = (run.held_out, None if run.accuracy is None else 1 - run.accuracy, run.loss)
        return next((value for value in values if value is not None), math.inf)


@contextlib.contextmanager
def _own_gpu(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a job of one process: where jobs share a machine with several GPUs each sees one that no other has."""
    environment = dict(os.environ)
    names = _gpus() if not os.environ.get(COMMAND) else []
    with contextlib.ExitStack() as stack:
        for name in names if len(names) > 1 else []:
            file = stack.enter_context((folder / f".gpu-{name}.lock").open("w"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                environment["CUDA_VISIBLE_DEVICES"] = name
                break
        yield environment


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
