"""Programs of this project in processes that are forked from one which has loaded torch, DeepSpeed and transformers already.

A small run spends most of its time on loading them. What runs is the program itself, from its first line and in a process of its own, with
the arguments, environment and outputs that a shell would give it. The parent (`python -m tests.forked MODULES`) has a single thread, reads one JSON
line a request, forks its processes, waits for all of them and answers with their exit statuses.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from training.launch import leave

ROOT = Path(__file__).resolve().parent.parent
LOADED = ("deepspeed", "hydra", "safetensors.torch", "torch._dynamo", "transformers", "transformers.modeling_utils")
STARTED = (  # what a run of the smallest model loads, and Hydra and DeepSpeed only then
    *(
        "data.loader",
        "evals.in_loop",
        "training.checkpoint",
        "training.config.cli",
        "training.engine",
        "training.loop",
        "training.guard.faults",
    ),
    *("training.saving.saver", "training.setup", "training.watch.metrics", "training.watch.observe", "training.watch.trace"),
    *("models.mixers.attention", "models.mixers.mamba2", "models.mixers.rnn", "models.cells.paragru", "models.channel.swiglu"),
    *("hydra._internal.core_plugins.file_config_source", "hydra._internal.core_plugins.basic_launcher", "antlr4.LL1Analyzer"),
    *("setuptools", "deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer"),
)
INTERPRETED = (
    "torch._dynamo",
    "triton.language",
    "triton.runtime.interpreter",
)  # with Triton in its interpreter, which is chosen on its import
GRACE = 10.0  # seconds


class Server:
    """A forking process of this test process, which has loaded `modules`; started with the first request."""

    def __init__(self, modules: tuple[str, ...], **extra: str) -> None:
        self.modules, self.extra = modules, extra
        self.process: subprocess.Popen[str] | None = None

    def run(self, jobs: list[dict[str, Any]], timeout: float) -> list[int]:
        """Exit statuses of `jobs`, negative for signals. When one fails the others have GRACE to end. Raises subprocess.TimeoutExpired."""
        if self.process is None:
            fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
            outer = {**os.environ, **fixed, **self.extra}
            command = [sys.executable, "-m", "tests.forked", *self.modules]
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=outer, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            atexit.register(self.stop)
        assert self.process.stdin is not None and self.process.stdout is not None
        guard = threading.Timer(timeout, self.stop)
        guard.start()
        try:
            self.process.stdin.write(json.dumps(jobs) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        finally:
            guard.cancel()
        if not answer:
            self.stop()
            raise subprocess.TimeoutExpired(str(jobs[0]["arguments"]), timeout)
        return json.loads(answer)

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


server, interpreting = Server((*LOADED, *STARTED)), Server(INTERPRETED, TRITON_INTERPRET="1")


def run_forked(arguments: list[str], environments: list[dict[str, str]], timeout: float) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` (a script, -m module or -c code) in the project's root, once with each environment at the same time. The result
    has the outputs of all, one after another, and the status of the first that failed. TRITON_INTERPRET=1 in the environments: forked from a
    process that has Triton so."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[f"{folder}/{i}.{name}" for name in ("out", "err")] for i in range(len(environments))]
        jobs = [{"arguments": arguments, "environment": e, "outputs": o} for e, o in zip(environments, outputs)]
        statuses = (interpreting if environments[0].get("TRITON_INTERPRET") == "1" else server).run(jobs, timeout)
        out, err = ("".join(Path(o[i]).read_text() for o in outputs) for i in (0, 1))
    return subprocess.CompletedProcess(arguments, next((s for s in statuses if s), 0), out, err)


class Running:
    """`python ARGUMENTS` forked, while the caller goes on: its pid, and `wait` for what run_forked returns. No other program can be forked before it
    ends."""

    def __init__(self, arguments: list[str], environment: dict[str, str], timeout: float) -> None:
        self.done: subprocess.CompletedProcess[str] | None = None
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "pid")

            def run() -> None:
                self.done = run_forked(arguments, [{**environment, "FORKED_PID": str(file)}], timeout)

            self.thread = threading.Thread(target=run, daemon=True)
            self.thread.start()
            while not (file.exists() and file.read_text()):
                assert self.thread.is_alive()
                time.sleep(0.01)
            self.pid = int(file.read_text())

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def runs(self) -> bool:
        return self.thread.is_alive()

    def wait(self) -> subprocess.CompletedProcess[str]:
        self.thread.join()
        assert self.done is not None, "it took too long"
        return self.done


def child(job: dict[str, Any]) -> int:
    """Becomes the program; returns its exit status."""
    for number, path in enumerate(job["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(job["environment"])
    if pid_file := os.environ.pop("FORKED_PID", ""):
        Path(pid_file).write_text(str(os.getpid()))
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    kind, *rest = job["arguments"] if job["arguments"][0] in ("-m", "-c") else ("", *job["arguments"])
    sys.argv = rest if kind != "-c" else ["-c", *rest[1:]]
    sys.path[:1] = [str(ROOT) if kind else str((ROOT / rest[0]).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(rest[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        leave(lambda: child(job))
    finally:
        os._exit(1)


def statuses(pids: list[int]) -> list[int]:
    """Waits for all. Ranks that are left when one has failed get the time to end by themselves, then they are killed."""
    status_of: dict[int, int] = {}
    end = float("inf")
    while len(status_of) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            status_of[pid] = os.waitstatus_to_exitcode(status)
            end = min(end, time.monotonic() + GRACE) if status_of[pid] else end
        elif time.monotonic() > end:
            for left in set(pids) - status_of.keys():
                os.kill(left, signal.SIGKILL)
            end = float("inf")
        else:
            time.sleep(0.01)
    return [status_of[pid] for pid in pids]


def serve() -> None:
    import importlib
    import logging

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(statuses([fork(job) for job in json.loads(line)])), file=answers, flush=True)


if __name__ == "__main__":
    serve()
