r"""Text from a checkpoint: the prompt is read in chunks in parallel, then one token at a time with the carried state.

    python -m scripts.generate checkpoint=runs/quickstart prompt="It is a truth" \
        [prompts=FILE] [max_new_tokens=100] [temperature=0.8] [top_k=50] [top_p=1.0] [min_p=0] [repetition_penalty=1.0] \
        [stop=TEXT] [stop_ids=1,2] [batch=8] [seed=0] [device=auto] [precision=fp32] \
        [document=FILE] [save=FILE] [resume=FILE]

temperature=0 is greedy. stop ends a text where it appears (several: a JSON list; \n is a line's end). prompts=FILE holds one prompt a
line; they run `batch` at a time. A recurrent model's state does not grow; attention layers keep their cache.

A long text is read once and asked many questions: document=FILE is read first, save=FILE keeps the session, resume=FILE goes on with it;
prompt and prompts then continue it, each from the same place. See docs/generation.md.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.records import decoded
from data.tokenizer import coder_of
from models.checkpoint import load_model
from models.decode import cast
from models.hub.importing import end_ids
from models.sampling import Sampling, TextStream
from models.session import Session, left_pad, refuse_what_is_no_session
from training.config.arguments import parse_arguments, program
from training.world import pick_device

LINE_END = re.compile(r"\r\n|\r|\n")
DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "prompt": None,
    "prompts": None,
    "document": None,
    "save": None,
    "resume": None,
    "max_new_tokens": 100,
    "temperature": "0.8",
    "top_k": "50",
    "top_p": "1.0",
    "min_p": "0",
    "repetition_penalty": "1.0",
    "stop": "",
    "stop_ids": "",
    "batch": 8,
    "seed": "0",
    "device": "auto",
    "precision": "fp32",
}


def _number(values: dict[str, Any], key: str, kind: type = float) -> Any:
    try:
        return kind(values[key])
    except ValueError:
        raise UserError(f"{key} must be a {'whole ' if kind is int else ''}number, not {values[key]!r}.") from None


def _stops(values: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """(stop strings, stop ids). Raises UserError."""
    text, ids = values["stop"], values["stop_ids"]
    if text.startswith("["):
        try:
            strings = json.loads(text)
        except ValueError:
            strings = None
        if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
            raise UserError(f'stop must be a text or a JSON list of texts such as ["\\n\\n", "Q:"], not {text!r}.')
    else:
        strings = [text.replace("\\n", "\n").replace("\\t", "\t")] if text else []
    parts = [part.strip() for part in ids.split(",")] if ids else []
    if not all(part.isdecimal() and int(part) < vocab_size for part in parts):
        raise UserError(f"stop_ids must be token ids below {vocab_size} with commas between them, not {ids!r}.")
    return strings, [int(part) for part in parts]


def _text(path: str, key: str) -> str:
    """What a file says, as data.prepare reads it."""
    try:
        return decoded(Path(path).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text, nor UTF-16 or UTF-32 with a byte-order mark"
        raise UserError(f"{key}={path} cannot be read: {reason}.") from error


class Writer:
    """The command: what is read, asked and shown."""

    def __init__(self, values: dict[str, Any]) -> None:
        """Raises UserError for anything that cannot be done, before anything is read."""
        self.values = values
        if not values["checkpoint"]:
            raise UserError("Say what to generate from: checkpoint=DIR.")
        if values["prompt"] is not None and values["prompts"] is not None:
            raise UserError("Give prompt=TEXT or prompts=FILE, not both.")
        if values["resume"] and values["document"]:
            raise UserError("Give document=FILE to read a text or resume=FILE to go on with a session, not both.")
        if values["save"] and values["prompts"]:
            raise UserError("save=FILE keeps one text; give one prompt, or leave prompts out and ask them with resume=FILE.")
        if values["save"] and Path(values["save"]).is_dir():
            raise UserError(f"save={values['save']} is a folder; give a file in it.")
        if values["save"]:
            refuse_what_is_no_session(Path(values["save"]))
        if values["save"] and not Path(values["save"]).absolute().parent.is_dir():
            raise UserError(f"save={values['save']} lies in no folder; make the folder first or give another file.")
        if values["device"] == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda, but torch sees no CUDA device; use device=auto or install a CUDA build of torch.")
        if values["precision"] not in ("fp32", "bf16"):
            raise UserError(f"precision is {values['precision']!r}; choose fp32 or bf16.")
        keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        numbers = {key: _number(values, key, int if key == "top_k" else float) for key in keys}
        self.seed = _number(values, "seed", int)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be a whole number from 0 up to 2^63, not {self.seed}.")
        self.sampling = Sampling(**numbers)
        self.prompts = self._prompts()
        self.document = _text(values["document"], "document") if values["document"] else None
        if self.document == "":
            raise UserError(f"document={values['document']} is empty; give a file that holds text.")
        self.model, tokenizer, meta = load_model(values["checkpoint"], pick_device(values["device"], "device"))
        if values["precision"] == "bf16":
            cast(self.model, torch.bfloat16)
        self.device = self.model.embedding.weight.device
        self.coder = coder_of(tokenizer, meta["folder"])
        self.stop, stop_ids = _stops(values, self.model.config.vocab_size)
        # a folder from elsewhere may have an end of its own
        self.stop_ids = [*self.coder.end_ids, *end_ids(Path(meta["folder"])), *stop_ids]
        self.start = Session.load(values["resume"], self.model) if values["resume"] else None
        if self.start is not None and len(self.start.ids_BT) > 1:
            raise UserError(f"The session {values['resume']} holds several texts side by side; the command goes on with one.")

    def _prompts(self) -> list[str]:
        if self.values["prompts"] is None:
            return [self.values["prompt"] if self.values["prompt"] is not None else "The "]
        prompts = [line for line in LINE_END.split(_text(self.values["prompts"], "prompts")) if line.strip()]
        if not prompts:
            raise UserError(f"prompts={self.values['prompts']} holds no prompt; write one a line.")
        return prompts

    def ids(self, text: str, start: bool = True) -> list[int]:
        """Ids of a text that begins a document, or goes on with one. Raises UserError where there is nothing to go on from."""
        ids = self.coder.encode(text, start)
        if not ids:
            raise UserError("The prompt is empty, and the tokenizer has no token that starts a text; give a prompt.")
        return ids

    def run(self) -> None:
        if self.document is not None:
            ids = torch.tensor([self.ids(self.document)], device=self.device)
            self.start = Session(self.model, ids, seed=self.seed).read(self.progress)
        if self.start is not None:
            self.ask(self.start)
        elif len(self.prompts) == 1:
            ids_1 = self.ids(self.prompts[0])
            self.show(Session(self.model, torch.tensor([ids_1], device=self.device), seed=self.seed), self.prompts[0], ids_1)
        else:
            for first in range(0, len(self.prompts), self.values["batch"]):
                self.show_batch(self.prompts[first : first + self.values["batch"]], self.seed + first)

    def ask(self, start: Session) -> None:
        """Every prompt from the same place. A document without a prompt is only read (and saved)."""
        if self.document is not None and self.values["prompt"] is None and self.values["prompts"] is None:
            if self.values["save"]:
                start.save(self.values["save"])
            return
        asked = self.prompts if self.values["prompt"] is not None or self.values["prompts"] else [""]
        for prompt in asked:
            session = start.copy()
            if prompt:
                session.append(torch.tensor([self.ids(prompt, start=False)], device=self.device))
            self.show(session, prompt, session.ids_BT[0].tolist())

    @staticmethod
    def progress(read: int, total: int) -> None:
        print(f"\rread {read} of {total} tokens", end="" if read < total - 1 else "\n", file=sys.stderr, flush=True)

    def show(self, session: Session, prompt: str, before: list[int]) -> None:
        """One text, as it comes."""
        stream = TextStream(self.coder.tokenizer, before, self.stop)
        print(prompt, end="", flush=True)

        def stop_when(row: int, token: int) -> bool:
            print(stream.push(token), end="", flush=True)
            return stream.stopped

        session.generate(self.values["max_new_tokens"], self.sampling, stop_ids=self.stop_ids, stop_when=stop_when)
        print(stream.finish(), flush=True)
        if self.values["save"]:
            session.save(self.values["save"])

    def show_batch(self, prompts: list[str], seed: int) -> None:
        """Several texts side by side, printed when all are written."""
        rows = [self.ids(p) for p in prompts]
        streams = [TextStream(self.coder.tokenizer, row, self.stop) for row in rows]
        ids_BT, lengths = left_pad(rows, rows[0][0], self.device)

        def stop_when(row: int, token: int) -> bool:
            streams[row].push(token)
            return streams[row].stopped

        session = Session(self.model, ids_BT, lengths, seed)
        session.generate(self.values["max_new_tokens"], self.sampling, stop_ids=self.stop_ids, stop_when=stop_when)
        for prompt, stream in zip(prompts, streams):
            stream.finish()
            print(prompt + stream.text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    return program(__doc__, lambda words: Writer(parse_arguments(words, DEFAULTS)).run(), arguments)


if __name__ == "__main__":
    sys.exit(main())
