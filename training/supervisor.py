"""Keeps a job running: restarts it after a failure or a hang, passes stop requests on, and leaves no process behind.

    python -m training.supervisor restarts=5 timeout=600 -- deepspeed --num_gpus 8 train.py experiment=NAME checkpoint.every=500

Every attempt goes on from the newest whole checkpoint, because that is what train.py does by itself; a train.resume= in the command holds
until a checkpoint has been written after it. The ranks tell how they are in
small files of `folder` (training/watch/observe.py); silence of all of them for `timeout` seconds is a hang: each writes the stacks of its threads to
rank-XXXXX.stacks there, then all are killed and the job starts again. Exit status: 0 finished; 2 a mistake in the call, or the job ended with
2 itself (its own message says what to mend); 3 restarts used up; 4 no new checkpoint in two attempts; 75 stopped on
request (its own, or one that the job got from elsewhere), call again to go on.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil

from data.fields import arguments_of
from training.config import ranges
from training.config.ranges import AMOUNT, Range
from training.errors import STOPPED, UserError, sentence_of
from training.watch.observe import FOLDER

FINISHED, MISTAKE, USED_UP, STUCK = 0, 2, 3, 4
FRUITLESS = 2  # attempts in a row without a new checkpoint before giving up
PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Settings:
    """Options of the command line. Times in seconds; `folder` is by default RUN_DIR/supervisor where the command names a run_dir."""

    restarts: Annotated[int, AMOUNT] = 3
    timeout: Annotated[float, Range(0)] = 0.0  # 0: a hang is not looked for
    startup: Annotated[float, Range(0)] = 1800.0  # silence allowed before the first step: kernels compile, other nodes come up
    backoff: Annotated[float, Range(0)] = 5.0  # before the first restart; doubles up to five minutes, starts over after a new checkpoint
    grace: Annotated[float, Range(0)] = 300.0  # from a stop request until what still runs is killed
    folder: str = ""


def parse(arguments: Sequence[str]) -> tuple[Settings, list[str]]:
    """(settings, command) of `[key=value ...] -- COMMAND ...`. Raises UserError with every problem."""
    if "--" not in arguments:
        raise UserError("Write: python -m training.supervisor [restarts=N] [timeout=SECONDS] -- COMMAND; the '--' is missing.")
    split = list(arguments).index("--")
    command: list[str] = list(arguments[split + 1 :])
    problems: list[str] = []
    options = ", ".join(f"{f.name}=" for f in dataclasses.fields(Settings))
    settings = arguments_of(arguments[:split], Settings, problems, lambda key, known: f"the options are {options}.")
    problems += ranges.problems(settings)
    if not command:
        problems.append("There is no command after '--'.")
    elif shutil.which(command[0]) is None:
        problems.append(f"There is no program {command[0]!r}.")
    if problems:
        raise UserError(problems)
    if not settings.folder:
        run_dir = [a.partition("=")[2] for a in command if a.startswith("run_dir=")]
        settings.folder = str(Path(run_dir[-1]) / "supervisor" if run_dir else Path("runs") / "supervisor" / str(os.getpid()))
    return settings, command


def descendants(root: int, leave: frozenset[int] = frozenset()) -> list[int]:
    """All processes below `root`, whatever their session or group, zombies included, without `leave` and those below them."""
    left, below = set(leave), []
    for process in psutil.Process(root).children(recursive=True):  # a parent comes before its children
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid in left or process.ppid() in left:
                left.add(process.pid)
            else:
                below.append(process.pid)
    return below


class Job:
    """One attempt: the command, everything it starts, and the files of its ranks.

    Launchers put ranks into sessions of their own and may die before them, so a process group does not hold a job together. This
    process makes itself the reaper of its descendants instead: whoever loses a parent becomes its child and is found, killed and reaped.
    """

    def __init__(self, command: list[str], folder: Path) -> None:
        self.folder = folder
        self.others = frozenset(descendants(os.getpid()))
        self.process = subprocess.Popen(command, start_new_session=True, env={**os.environ, FOLDER: str(folder)})
        self.heard = time.monotonic()
        self.last: dict[Path, int] = {}
        self.began: int | None = None  # the step of the checkpoint that this attempt started from

    def poll(self) -> int | None:
        """Exit status of the command itself, None while it runs; reaps orphans that ended."""
        status = self.process.poll()
        for pid in self._living(direct=True):
            if pid != self.process.pid:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        return status

    def _living(self, direct: bool = False) -> list[int]:
        if direct:
            return [child.pid for child in psutil.Process().children() if child.pid not in self.others]
        return descendants(os.getpid(), self.others)

    def ranks(self) -> dict[int, Path]:
        """The training processes of this machine by process id, with their files."""
        living, files = set(self._living()), {}
        for path, row in rank_files(self.folder):
            if row.get("host") == socket.gethostname() and row.get("pid") in living:
                files[row["pid"]] = path
        return files

    def silence(self) -> tuple[float, bool]:
        """(seconds since a rank of this machine last wrote its file, whether any rank ever did). Time is this process's clock: that of the
        disk may differ."""
        rows = [
            (path, row) for path, row in rank_files(self.folder) if row.get("step") is not None and row.get("host") == socket.gethostname()
        ]
        if rows and self.began is None:
            self.began = min(row.get("saved") or 0 for _, row in rows)
        changed_at = {path: path.stat().st_mtime_ns for path, _ in rows}
        if changed_at != self.last:
            self.last, self.heard = changed_at, time.monotonic()
        return time.monotonic() - self.heard, bool(changed_at)

    def ask_to_stop(self, number: int) -> None:
        """Tells the ranks alone, so that launchers do not kill them in their save; without known ranks tells every process."""
        send(list(self.ranks()) or self._living(), number)

    def dump_stacks(self, wait: float = 10.0) -> list[Path]:
        """Has every rank of this machine write its stacks; returns the files written."""
        ranks = self.ranks()
        files = [path.with_suffix(".stacks") for path in ranks.values()]
        send(list(ranks), signal.SIGUSR2)
        send(list(ranks), signal.SIGCONT)  # a stopped process hears nothing before
        end = time.monotonic() + wait
        while time.monotonic() < end and any(not f.exists() or not f.stat().st_size for f in files):
            time.sleep(0.05)
        time.sleep(0.2)
        return [f for f in files if f.exists() and f.stat().st_size]

    def kill(self) -> int:
        """Kills and reaps whatever is left; returns how many processes that were."""
        killed: set[int] = set()
        while self.poll() is None or self._living():
            left = self._living()
            killed |= set(left)
            send(left, signal.SIGKILL)
            time.sleep(0.02)
        return len(killed)


def send(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def rank_files(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(file, what it says) of every rank that wrote one into `folder`."""
    rows = []
    for path in sorted(folder.glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError):
            rows.append((path, json.loads(path.read_text())))
    return rows


class Supervisor:
    """Runs a command until it has finished; see the module's text for what `run` returns."""

    def __init__(self, settings: Settings, command: list[str], say: Any = None) -> None:
        self.settings, self.command = settings, command
        self.folder = Path(settings.folder)
        self.say = say or (lambda text: print(f"supervisor: {text}", file=sys.stderr, flush=True))
        self.asked = 0
        self.attempt = 0
        self.began: int | None = None

    def note(self, text: str, **values: Any) -> None:
        """A line for people, and the same in supervisor.jsonl."""
        self.say(text)
        with contextlib.suppress(OSError), (self.folder / "supervisor.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "attempt": self.attempt, "what": text, **values}) + "\n")

    def run(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._signals(), subreaper():
            saved, fruitless, backoff = self._saved(0), 0, self.settings.backoff
            while True:
                status = self._attempt()
                if self.asked:
                    self.note(f"stopped on {signal.Signals(self.asked).name}; the same command goes on from the last checkpoint.")
                    return STOPPED
                if status == STOPPED or status != FINISHED and self._stopped():
                    self.note("the job was asked to stop and has saved; the same command goes on from there.")
                    return STOPPED
                if status in (FINISHED, MISTAKE):
                    self.note("finished." if not status else "the job ended with status 2, a mistake that a restart does not mend.")
                    return FINISHED if not status else MISTAKE
                now = self._saved(saved)
                advanced = self.began is not None and now > self.began
                if advanced:
                    self.command = ["train.resume=auto" if a.startswith("train.resume=") else a for a in self.command]
                # A lower step is new as well: of a branch from an older checkpoint.
                fruitless, backoff = (0, self.settings.backoff) if advanced or now != saved else (fruitless + 1, backoff)
                saved = now
                if self.attempt > self.settings.restarts:
                    self.note(f"giving up after {self.settings.restarts} restart(s); the last status was {status}.", status=status)
                    return USED_UP
                if fruitless >= FRUITLESS:
                    self.note(f"giving up: {FRUITLESS} attempts in a row ended with status {status} and no new checkpoint.", status=status)
                    return STUCK
                self.note(f"restart {self.attempt} of {self.settings.restarts} in {backoff:g} s, from step {saved}.", saved=saved)
                self._wait(backoff)
                backoff = min(2 * backoff, 300.0)

    def _attempt(self) -> int:
        """Runs the command once. Returns its status; -9 for a hang."""
        self.attempt += 1
        here = socket.gethostname()
        hosts = {path.stem: row.get("host", here) for path, row in rank_files(self.folder)}
        for path in self.folder.glob("rank-*"):
            if hosts.get(path.stem, here) != here:
                continue  # another machine's, whose own supervisor sees to it
            if path.suffix == ".stacks" and path.stat().st_size:
                path.rename(path.with_name(f"attempt-{self.attempt - 1}-{path.name}"))
            elif path.suffix != ".json":
                path.unlink()
        for path, row in rank_files(self.folder):  # keeps what was saved, forgets that the rank was alive
            if hosts.get(path.stem, here) == here:
                path.write_text(json.dumps({"host": here, "saved": row.get("saved")}))
        if self.asked:
            return STOPPED
        job = Job(self.command, self.folder)
        forwarded, deadline = 0, float("inf")
        try:
            while (status := job.poll()) is None:
                if self.asked and not forwarded:
                    forwarded, deadline = self.asked, time.monotonic() + self.settings.grace
                    job.ask_to_stop(signal.SIGTERM)
                if time.monotonic() > deadline:
                    self.note(f"still running {self.settings.grace:g} s after the stop request; killed.")
                    return -signal.SIGKILL
                silent, heard = job.silence()
                if self.settings.timeout and not forwarded and silent > (self.settings.timeout if heard else self.settings.startup):
                    files = [str(f) for f in job.dump_stacks()]
                    self.note(
                        f"no rank took a step for {silent:.0f} s; stacks in {', '.join(files) or 'no file (no rank answered)'}.",
                        stacks=files,
                    )
                    return -signal.SIGKILL
                time.sleep(0.05)
            return status
        finally:
            self.began = job.began
            left = job.kill()
            if left:
                self.note(f"killed {left} process(es) that the job had left.", left=left)

    def _stopped(self) -> bool:
        """Whether all ranks of this machine ended on a request of somebody else; launchers have statuses of their own for that."""
        here = [row for _, row in rank_files(self.folder) if row.get("host") == socket.gethostname()]
        return bool(here) and all(row.get("stopped") for row in here)

    def _saved(self, otherwise: int) -> int:
        """The step of the newest checkpoint that the ranks know of."""
        return max((row.get("saved") or 0 for _, row in rank_files(self.folder)), default=otherwise)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.asked:
            time.sleep(0.05)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, frame: Any) -> None:
            self.asked = number

        # The job is in a session of its own, so a terminal that closes must not take the supervisor alone; under nohup it is not heard at all.
        heard = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {n: signal.signal(n, handle) for n in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Orphaned descendants become children of this process (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit status."""
    if any(a in ("-h", "--help") for a in (arguments[: arguments.index("--")] if "--" in arguments else arguments)):
        print(__doc__)
        return FINISHED
    try:
        settings, command = parse(arguments)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return MISTAKE
    try:
        return Supervisor(settings, command).run()
    except OSError as error:  # of the folder for the ranks' files, or of a command that is not there
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
