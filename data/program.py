"""How the programs of every floor run: help, mistakes in a sentence each, and the exit status."""

from __future__ import annotations

import argparse
import codecs
import difflib
import io
import locale
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from data.errors import UserError, sentence_of
from kernels import interrupts
from kernels.interrupts import INTERRUPTED

FILES = 128  # that a program may have to open at once: a run of one rank takes 40, others more with their libraries


def program(doc: str | None, run: Callable[[list[str]], Any], words: list[str] | None = None, interrupted: str = "interrupted") -> int:
    """Exit status of a program whose body is `run`, without tracebacks for what is no fault of the program: its docstring for -h, a line for
    each problem of a UserError and one for what the operating system refuses (2), the line `interrupted` for Ctrl-C (130).

    `words` is the command line (that of this process unless given); `run` may return a status of its own."""
    words = sys.argv[1:] if words is None else words
    try:
        if any(word in ("-h", "--help", "help") for word in words):
            print(doc, flush=True)
            return 0
        ready(words)
        return int(run(words) or 0)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED


def ready(words: list[str]) -> None:
    """What a program does before it begins, once it has loaded what that needs. Raises UserError with what stands in the way of it."""
    interrupts.begin()
    printable()
    unreadable(words)
    enough_files()


def printable() -> None:
    """Lets this process print any text: letters that its terminal's encoding does not have (latin-1, say) become escapes, instead of an error that
    ends a run at a sample of its text. Raises UserError where files would be read and written in another encoding than UTF-8, that of the project's."""
    files = locale.getpreferredencoding(False)
    if codecs.lookup(files).name != "utf-8":
        raise UserError(f"Python takes text files for {files} here, and they are UTF-8: set PYTHONUTF8=1 and run the same command again.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def enough_files() -> None:
    """Lets this process open FILES files at once, which libraries do without a sentence of their own where they cannot. Raises UserError."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if now != unlimited and now < FILES:
        if most != unlimited and most < FILES:
            raise UserError(
                f"This shell lets a program open {most} files at once, and {FILES} are wanted; allow more with ulimit -n 1024, in a new shell."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, most))


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaint is one sentence, a UserError; a setting written `key=value`, as for other programs, is answered with a flag."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrecognized") else []
        flags = [flag.removeprefix("--") for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        for word in unknown:
            key, equals, value = word.lstrip("-").partition("=")
            near = difflib.get_close_matches(key.replace("_", "-"), flags, n=1)
            written = f"--{near[0]}={value}" if near and equals else f"--{near[0]}" if near else ""
            message = f"Unknown argument {word!r}; " + (
                f"write {written}" if near else f"known are {', '.join('--' + flag for flag in flags)}"
            )
            break
        raise UserError(f"{message[:1].upper()}{message[1:]}; --help says more.")


def unreadable(words: list[str]) -> None:
    """Raises UserError for words of the command line that hold bytes which are no text in this terminal's encoding."""
    broken = [word for word in words if any("\udc80" <= c <= "\udcff" for c in word)]  # as Python keeps bytes it cannot decode
    if broken:
        raise UserError(
            [
                f"The argument {os.fsencode(word).decode(errors='backslashreplace')} holds bytes that are no "
                f"{sys.getfilesystemencoding().upper()} text; write it in that encoding."
                for word in broken
            ]
        )
