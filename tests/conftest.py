"""Shared fixtures: token shards of a little real text, and a way to run the project's programs as a user would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Running, run_forked

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # a job in the background of a shell, or under nohup, starts so, and hands it down
        signal.signal(number, usual)

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["experiment=smoke", "train.device=cpu"]


DURATIONS = ROOT / "tests/durations.json"  # seconds of each file, written with RECORD_DURATIONS=1 (scripts/test.sh on an idle machine)
taken: dict[str, float] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, so that no worker begins one when the others have nothing left; a file stays together."""
    known = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -known.get(item.nodeid.partition("::")[0], 0.0))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = report.nodeid.partition("::")[0]
    taken[file] = taken.get(file, 0.0) + report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("RECORD_DURATIONS") and not hasattr(session.config, "workerinput"):
        known = {file: seconds for file, seconds in json.loads(DURATIONS.read_text()).items() if (ROOT / file).exists()}
        known |= {file: round(seconds, 1) for file, seconds in taken.items()}
        DURATIONS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """After an illegal access every call of this process to its GPU fails: a worker of xdist ends with it, and a new one takes the tests that are left."""
    report = yield
    if report.failed and hasattr(item.config, "workerinput") and "illegal memory access" in str(report.longrepr):
        sys.stderr.write(f"{item.nodeid}: {call.excinfo}\n")
        os._exit(1)
    return report


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers are the same whatever ran before: with a rare draw, rounding passes a bound that all others keep."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A program that was called in this process may leave a handler of its own; pools of processes, which fork, then wait for ever for workers
    that do not end on SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def gpu_memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several workers share a GPU; what one keeps for later, the others lack."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()


def on_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test that needs a GPU."""
    import torch

    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


@pytest.fixture
def most_of_a_gpu() -> Iterator[None]:
    """50 GiB of GPU memory, which one test at a time may have."""
    import fcntl
    import tempfile
    import time

    import torch

    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB")
    with (Path(tempfile.gettempdir()) / "everywhen-most-of-a-gpu").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for _ in range(240):
            if torch.cuda.mem_get_info()[0] > 50 << 30:
                break
            time.sleep(0.5)
        yield
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a part of the demo corpus with a 512-token BPE."""
    out = tmp_path_factory.mktemp("shards") / "demo"
    done = run_program(["-m", "data.prepare", "input=demo", f"out={out}", "tokenizer=bpe:512", "limit_docs=4", "valid_fraction=0.3"])
    assert done.returncode == 0, done.stderr
    return out


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_ranks(ranks: int, arguments: list[str], timeout: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` on the ranks of one machine, as torchrun starts them but without its process and the loading of libraries."""
    shared = environment(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), **extra)
    return run_forked(arguments, [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)], timeout)


def run_program(arguments: list[str], timeout: float = 300, *, started: bool = False, **extra: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in the project's root: forked (tests/forked.py), or really `started` by a shell's means."""
    if not started and arguments[:2] != ["-m", "torch.distributed.run"]:
        return run_forked(arguments, [environment(**extra)], timeout)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=timeout, check=False
    )


def start_program(arguments: list[str], timeout: float = 300, **extra: str) -> Running:
    """`python ARGUMENTS` in the project's root, forked, to be sent signals."""
    return Running(arguments, environment(**extra), timeout)


# A forked process has loaded the project already, which the checker is to do without.
FORGET = """
import runpy, sys
from models.hub.check_folder import HIDDEN
for name in [n for n in sys.modules if n.split(".")[0] in HIDDEN]:
    del sys.modules[name]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def forked_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exported folder of transformers' own classes is loaded in a forked process; that they are found without this project is shown elsewhere
    (tests/hub/test_families.py), in processes that are really started."""
    from models.hub import export

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-I", str(export.CHECKER)]
        return run_forked(["-c", FORGET, *command[2:]], [{**environment(), **env}], 300)

    monkeypatch.setattr(export.subprocess, "run", run)


@pytest.fixture
def train(demo_shards: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """train(run_name, *overrides) runs train.py on the small shards; the run folder is tmp_path/run_name. launcher: words before train.py,
    all processes are then really started; ranks: so many forked ones."""

    def run(
        name: str, *overrides: str, launcher: list[str] | None = None, ranks: int = 1, **extra: Any
    ) -> subprocess.CompletedProcess[str]:
        arguments = ["train.py", *SMALL, f"data.path={demo_shards}", f"run_dir={tmp_path / name}", *overrides]
        if ranks > 1:
            return run_ranks(ranks, arguments, **extra)
        return run_program([*(launcher or []), *arguments], started=bool(launcher), **extra)

    return run
