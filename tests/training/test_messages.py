"""What a person meets when something is wrong outside the settings: files, launchers, ports, terminals, interrupts; and what --help says."""

from __future__ import annotations

import functools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.prepare import main as prepare
from data.shards import read_meta
from kernels.parallel_rnn.cell import Cell, Pre, State
from models.cells import load_cell
from scripts import print_kernels
from tests.arrows import FLOORS
from tests.conftest import ROOT, SMALL, environment, run_program
from training.config import cli
from training.config.arguments import program
from training.config.cli import CONFIG_DIR, checked, compose_config
from training.config.help import comments_of, help_text
from training.errors import UserError
from training.launch import Launch, launch, world_size
from training.watch.metrics import Metrics

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "text, part",
    [
        ("a: [1\nb: 2\n", "bad.yaml is not YAML: line 2, column 2"),
        ("\tname: x\n", "bad.yaml is not YAML: line 1, column 1"),
        ("name: x\nname: y\n", "bad.yaml is not YAML: line 2"),
        ("name: 'x\n", "bad.yaml is not YAML: line"),
        (b"name: \xff\n", "not UTF-8"),
        ("# @package _global_\n- a\n- b\n", "experiment/bad holds a list; settings are written 'key: value'"),
        ("# @package _global_\ndefaults:\n  - override /model: nosuch\n", "nosuch"),
    ],
)
def test_a_config_of_ones_own_that_is_no_yaml(text: str | bytes, part: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        compose_config(["experiment=bad"], extra=tmp_path)
    assert len(caught.value.problems) == 1 and part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, by_hydra", [(["train.steps=7"], False), (["train.steps=7", "hydra.job.chdir=true"], True), (["--run", "train.steps=7"], True)]
)
def test_what_was_checked_is_what_runs_and_hydra_composes_again_only_for_its_own_settings(
    words: list[str], by_hydra: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    assert cli.run(lambda config=None: given.append(config)) == 0
    assert given == [None] if by_hydra else given[0].train.steps == 7 and "hydra" not in given[0]


def test_a_file_may_ask_for_what_hydras_main_does() -> None:
    for word in ("hydra.mode=MULTIRUN", "hydra.output_subdir=.hydra", "+hydra.callbacks.x={_target_: x}", "+hydra.job.env_set.A=b"):
        assert cli._needs_hydra([], compose_config([word], with_hydra=True).hydra), word


def test_an_error_that_is_no_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert cli.run(lambda config: open("/nosuch/x")) == 1  # an OSError that train.py lets pass is worth another try: not status 2
    assert "Traceback" in capsys.readouterr().err


def test_configs_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain:\n  steps: 7   # a week\n")
    assert compose_config(["experiment=mine"], extra=tmp_path).train.steps == 7
    assert "steps: 7" in (page := help_text(["experiment=mine"], [tmp_path, CONFIG_DIR])) and "# a week" in page
    (tmp_path / "experiment" / "mine.yaml").write_text("train:\n  steps: 7\n")
    with pytest.raises(UserError, match="@package _global_"):
        checked(compose_config(["experiment=mine"], extra=tmp_path))
    with pytest.raises(UserError, match="--config-dir"):
        compose_config([], extra=tmp_path / "nosuch")


@pytest.mark.parametrize(
    "environment, part",
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=''"),
        ({"WORLD_SIZE": "2"}, "no RANK"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
        ({"MASTER_PORT": ""}, "MASTER_PORT=''"),
    ],
)
def test_what_a_launcher_says_is_checked(environment: dict[str, str], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        launch()
    assert len(caught.value.problems) == 1 and part in str(caught.value)


def test_a_process_without_a_launcher_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch() == Launch(0, 0, 1) and world_size() == 1
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launch() == Launch(3, 1, 4) and world_size() == 4


def test_an_empty_world_size_and_a_port_in_use_end_training_in_a_sentence(demo_shards: Path, tmp_path: Path) -> None:
    words = ["train.py", *SMALL, f"data.path={demo_shards}", f"run_dir={tmp_path / 'run'}"]
    done = run_program(words, WORLD_SIZE="")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "WORLD_SIZE=''" in done.stderr
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        done = run_program(words, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 2 and f"error: Port {port} of this machine is in use" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert program("", lambda words: Path("/proc/nowhere/x").mkdir(parents=True)) == 2
    assert capsys.readouterr().err.startswith("error: /proc/nowhere") and program("", lambda words: Path("/dev/null/x").write_text("")) == 2


@pytest.mark.parametrize(
    ("soft", "hard", "now", "says"),
    [
        (20, 20, 20, "lets a program open 20 files at once, and 128"),
        (20, 4096, 128, ""),
        (1024, 4096, 1024, ""),
        (20, -1, 128, ""),
        (-1, -1, -1, ""),
    ],
)
def test_a_shell_that_allows_few_files(soft: int, hard: int, now: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.append(pair))
    assert program("", lambda words: 0, []) == (2 if says else 0)
    assert says in capsys.readouterr().err and limits[-1] == (now, hard)


def test_an_interrupt_and_bytes_that_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(words: list[str]) -> None:
        raise KeyboardInterrupt

    assert program("", stop, []) == 130 and "Traceback" not in capsys.readouterr().err
    assert program("", stop, ["prompt=a\udcffb"]) == 2 and "prompt=a\\xffb holds bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra,status,out,err",
    [
        ({"PYTHONIOENCODING": "latin-1"}, 0, b"gr\xfc\xdfe \\ufffd\n", ""),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, 2, b"", "set PYTHONUTF8=1"),
    ],
)
def test_a_terminal_that_is_not_utf8_prints_all_and_files_are_utf8(extra: dict[str, str], status: int, out: bytes, err: str) -> None:
    said = "from data.program import program; raise SystemExit(program('', lambda words: print('gr\\xfc\\xdfe \\ufffd'), []))"
    done = subprocess.run([sys.executable, "-c", said], cwd=ROOT, env=environment(**extra), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (status, out) and err in done.stderr.decode()


def test_sources_are_written_of_cells_that_are_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main = print_kernels.main
    assert main(["nosuch"]) == 2 and "there is no cell 'nosuch'" in capsys.readouterr().err
    assert main(["--help"]) == 0 and capsys.readouterr().out.startswith("Prints the Triton source")
    assert main(["gru", "lstm"]) == 2 and "choose solve or decode" in capsys.readouterr().err
    assert main(["gru", "solve", "decode"]) == 2
    assert main(["mingru"]) == 0 and "def walk" in capsys.readouterr().out
    assert main(["mingru", "decode"]) == 0 and "def project_and_step" in capsys.readouterr().out
    loop = Cell.from_step(_with_a_loop, "loop")
    monkeypatch.setattr(print_kernels, "load_cell", lambda name: loop)
    assert main(["loop"]) == 2 and "runs as a loop: " in capsys.readouterr().err


def _with_a_loop(z: Pre, h: State) -> tuple[State]:
    return (torch.lgamma(h) + z,)


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    """Only what is meant for the person at the terminal becomes a sentence: no other ValueError does."""

    def wrong(words: list[str]) -> None:
        torch.zeros(2).view(3) if words else int("x")

    for words, kind in ((["a"], RuntimeError), ([], ValueError)):
        with pytest.raises(kind):
            program("", wrong, words)
    assert program("", lambda words: load_cell("nosuch"), []) == 2 and program("", lambda words: read_meta(Path("/nosuch")), []) == 2
    with pytest.raises(
        ValueError
    ):  # a broken function of ours, in a program whose every ValueError used to be taken for a mistake of the user's
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data.prepare.prepare", lambda arguments: int("x"))
            prepare(["input=demo", "out=x", "tokenizer=bytes"])


@functools.cache
def moved_programs() -> list[Path]:
    """Modules that only tell where their command lies now."""
    return [p for folder in FLOORS for p in sorted((ROOT / folder).rglob("*.py")) if "sys.exit(moved(" in p.read_text()]


@pytest.mark.parametrize("path", moved_programs(), ids=lambda p: p.stem)
def test_a_command_that_has_moved_says_where(path: Path) -> None:
    done = run_program(["-m", ".".join(path.relative_to(ROOT).with_suffix("").parts), "checkpoint=x"])
    match = re.fullmatch(r"error: This command has moved; run python -m (\S+)( .*)? with the same arguments\.\n", done.stderr)
    assert done.returncode == 2 and match is not None and not done.stdout, done.stderr
    assert "__main__" in (ROOT / match[1].replace(".", "/")).with_suffix(".py").read_text()


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("words", [["train.py"], ["-m", "scripts.generate"], ["-m", "scripts.print_kernels"]])
def test_an_interrupt_while_libraries_load(words: list[str], library: str, tmp_path: Path) -> None:
    stub = "import time\nprint('loading', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"  # as torch does in C++
    (tmp_path / f"{library}.py").write_text(stub)
    env = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and said.strip() == "interrupted", said


def test_an_interrupt_in_an_import_of_a_program_that_has_begun_waits_for_it(tmp_path: Path) -> None:
    stub = (
        "import time\nprint('loading', flush=True)\ntry:\n    time.sleep(0.5)\nexcept BaseException:\n    print('swallowed', flush=True)\n"
    )
    (tmp_path / "library.py").write_text(stub)
    run = (
        "def run(words):\n    import library, time\n    try:\n        time.sleep(60)\n    finally:\n        print('put away', flush=True)\n"
    )
    code = (
        f"from kernels import interrupts\ninterrupts.quiet()\nfrom data.program import program\n{run}raise SystemExit(program('', run, []))"
    )
    env = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    out, said = process.communicate()
    assert (process.returncode, out, said.strip()) == (130, "put away\n", "interrupted")


def test_an_interrupt_of_a_library_user_is_left_alone() -> None:
    done = run_program(["-c", "import sys, models, training, data, evals, scripts; print(sys.excepthook is sys.__excepthook__)"])
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("model", ["hybrid", "mamba2", "paragru", "paralstm", "transformer"])
@pytest.mark.parametrize("data", ["demo", "synthetic"])
def test_help_says_of_every_key_what_it_means(model: str, data: str) -> None:
    page = help_text([f"model={model}", f"data={data}", "train.steps=12"], [CONFIG_DIR])
    keys = page.partition("present values")[2].splitlines()[2:]
    assert "  steps: 12 " in page and len(keys) > 80
    assert [line for line in keys if re.match(r" *[a-z_0-9]+: .", line) and "# " not in line] == []


def test_comments_are_found_by_key() -> None:
    text = "a: 1  # one\nb:\n  c: 'x # y'   # two\n  d: [1, 2]\nlist:   # three\n  - 1\ne: 5\n"
    assert comments_of(text) == {"a": "one", "b.c": "two", "list": "three"}


def test_every_command_that_is_told_can_be_typed() -> None:
    """`python -m MODULE` in messages, docstrings, pages and scripts: a program, and where it lies now."""
    told = re.compile(rf"python3? -m ((?:{'|'.join(FLOORS)})(?:\.\w+)*)")
    folders = [ROOT / name for name in (*FLOORS, "docs", "configs")]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "train.py"]
    pages += [p for folder in folders for end in ("py", "md", "sh", "yaml", "sbatch") for p in folder.rglob(f"*.{end}")]
    wrong = []
    for page in pages:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            for name in told.findall("" if "used to be |" in line else line):
                path = ROOT / name.replace(".", "/")
                file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
                if not file.is_file() or "__main__" not in file.read_text() + file.stem or file in moved_programs():
                    wrong.append(f"{page.relative_to(ROOT)}:{number}: {name}")
    assert not wrong, "no such program:\n" + "\n".join(wrong)


def programs() -> list[list[str]]:
    files = []
    for path in sorted(
        p for folder in ("kernels", "data", "models", "training", "evals", "scripts") for p in (ROOT / folder).rglob("*.py")
    ):
        if '__name__ == "__main__"' in path.read_text() and path not in moved_programs():
            name = path.relative_to(ROOT)
            files.append([str(name)] if name.stem == "check_folder" else ["-m", ".".join(name.with_suffix("").parts)])
    return [*files, ["train.py"]]


@pytest.mark.slow
@pytest.mark.parametrize("words", programs(), ids=lambda words: words[-1])
def test_every_program_answers_help(words: list[str]) -> None:
    done = run_program([*words, "--help"])
    assert done.returncode == 0 and len(done.stdout) > 100 and "Traceback" not in done.stderr and "error" not in done.stderr


@pytest.mark.parametrize("script", sorted(p for p in (ROOT / "scripts").rglob("*") if p.suffix in (".sh", ".sbatch")), ids=lambda p: p.name)
def test_every_script_answers_help_by_a_link_in_another_folder(script: Path, tmp_path: Path) -> None:
    (tmp_path / script.name).symlink_to(script)
    done = subprocess.run(["bash", script.name, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 0 and len(done.stdout) > 40 and not done.stderr


@pytest.mark.parametrize(
    "words,ends",
    [
        (["eval_suite.sh", "rün 1", "lr=0.1", "org/model", "text=a b", "out=öut 1", "seed=1"],
         "{root}\n-m\nevals.run\ncheckpoint={here}/rün 1,{here}/lr=0.1,org/model\ntext={here}/a b\nout={here}/öut 1\nseed=1\nsuite=all\n"),
        (["export_hub.sh", "rün 1", "öut 1", "--dtype", "bf16"], "{here}\n-m\nscripts.export\nrün 1\nöut 1\n--dtype\nbf16\n"),
        (["export_hub.sh", "rün 1"], ""),
        (["eval_suite.sh"], ""),
        (["eval_suite.sh", "seed=1"], ""),
    ],
)  # fmt: skip
def test_a_script_takes_the_folders_of_whoever_calls_it(words: list[str], ends: str, tmp_path: Path) -> None:
    for name in ("rün 1", "lr=0.1", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "a b").write_text("text")
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    env = environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", NO_SETUP="1")
    words = [os.path.relpath(ROOT / "scripts" / words[0], tmp_path), *words[1:]]
    done = subprocess.run(["bash", *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20, env=env)
    assert done.stdout == ends.format(root=ROOT, here=tmp_path) and done.returncode == (0 if ends else 2), done.stderr
    assert bool(done.stderr) != bool(ends) and "sed" not in done.stderr


def test_a_script_uses_the_active_environment(tmp_path: Path) -> None:
    for home, status in ((Path(sys.prefix), 0), (tmp_path, 2)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        if not (tmp_path / "bin" / "python").exists():
            (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
            (tmp_path / "bin" / "python").chmod(0o755)
        code = f"source {ROOT}/scripts/common.sh; setup_venv dev core; command -v python"
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False, env=environment(VIRTUAL_ENV=str(home)))
        assert done.returncode == status, done.stderr
        assert done.stdout.strip() == f"{home}/bin/python" if status == 0 else "pip install -e '.[dev]'" in done.stderr


def test_the_lines_of_the_log_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics.__new__(Metrics)
    metrics.run_dir, metrics.main = tmp_path, True
    metrics.say("one\ntwo")
    metrics.say("three")
    assert [line.split(" ", 2)[2] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two", "three"]
