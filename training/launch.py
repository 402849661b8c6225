"""What a launcher (torchrun, deepspeed, srun) says in the environment of each rank, read in one place and checked before it is believed; and
how the program of a rank ends."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from training.errors import UserError

USUAL = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
MEANINGS = {
    "RANK": "the number of this process, from 0",
    "LOCAL_RANK": "its number on this machine, from 0",
    "WORLD_SIZE": "how many processes there are",
}


@dataclass(frozen=True)
class Launch:
    """rank of `size` processes; local: its number on this machine."""

    rank: int
    local: int
    size: int


def _number(name: str, problems: list[str]) -> int:
    text = os.environ.get(name, USUAL[name])
    if text.isdecimal() and (int(text) > 0 or name != "WORLD_SIZE"):
        return int(text)
    problems.append(
        f"The environment says {name}={text!r}, which must be {MEANINGS[name]}; unset it, or start with torchrun or deepspeed, which set it."
    )
    return 1


def world_size() -> int:
    """How many processes there are. Raises UserError where the environment says something else than a number."""
    problems: list[str] = []
    size = _number("WORLD_SIZE", problems)
    if problems:
        raise UserError(problems)
    return size


def launch() -> Launch:
    """Where the launcher put this process; a process without one is alone. Raises UserError for variables that make no sense together."""
    problems: list[str] = []
    launched = Launch(_number("RANK", problems), _number("LOCAL_RANK", problems), _number("WORLD_SIZE", problems))
    port = os.environ.get("MASTER_PORT", USUAL["MASTER_PORT"])
    if not port.isdecimal() or int(port) > 65535:
        problems.append(f"The environment says MASTER_PORT={port!r}, which must be a port, a whole number up to 65535; change or unset it.")
    if problems:
        raise UserError(problems)
    if launched.size > 1 and "RANK" not in os.environ:
        raise UserError(
            f"The environment says WORLD_SIZE={launched.size} but no RANK; unset it, or start with torchrun or deepspeed, which set both."
        )
    if launched.rank >= launched.size:
        raise UserError(
            f"The environment says RANK={launched.rank} of WORLD_SIZE={launched.size}; ranks count from 0, so that the last is {launched.size - 1}."
        )
    return launched


def local_rank() -> int:
    """The number of this process on its machine, which is the number of its GPU. Raises UserError where the environment says no number."""
    problems: list[str] = []
    number = _number("LOCAL_RANK", problems)
    if problems:
        raise UserError(problems)
    return number


def ranks_here() -> int:
    """How many of the processes run on this machine, where a launcher says so; else 1."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def first_of_all() -> bool:
    """Whether this process speaks for all of them, whatever else the environment says: rank 0, or one without a launcher."""
    return os.environ.get("RANK", USUAL["RANK"]) == "0"


def first_here() -> bool:
    """Whether this process speaks for its machine: the first rank there, or one that has been told nonsense."""
    text = os.environ.get("LOCAL_RANK", "0")
    return not text.isdecimal() or int(text) == 0


def unreachable(error: Exception) -> UserError:
    """The sentence for a process group that could not be made: torch's `error` names the reason somewhere in its lines."""
    address, port = (os.environ.get(name, USUAL[name]) for name in ("MASTER_ADDR", "MASTER_PORT"))
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return UserError(
            f"Port {port} of this machine is in use, by another job perhaps; give a free one: MASTER_PORT, or --master_port of torchrun and deepspeed."
        )
    return UserError(f"The ranks could not meet at {address}, port {port} (MASTER_ADDR, MASTER_PORT): {text[:200]}.")


def leave(main: Callable[[], Any]) -> NoReturn:
    """Runs `main` and ends the process with the status that it returns or raises as SystemExit, before the interpreter takes itself apart.

    A thread of Gloo that still lets go of the last tensor then would abort the process, whose work is done (PyTorch issue 190489): DeepSpeed's
    modules and every parameter hold the process group, so that its threads outlive `destroy_process_group`. Threads are waited for and what
    is registered to run at exit runs, as in an ordinary end. A child of multiprocessing is left to it: what is registered there is its parent's.
    """
    if multiprocessing.parent_process() is not None:
        sys.exit(main())
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError):  # nobody reads on the other side, or it is closed
            if stream is not None:
                stream.flush()
    os._exit((status if isinstance(status, int) else int(status is not None)) & 0xFF)
