"""The interface that every evaluation uses: a model that is fed token ids in chunks, its state carried from one chunk to the next.

    adapter = load_adapter("runs/quickstart", "cpu")            # evals/adapters/load.py: ours, or any Hugging Face causal language model
    state = adapter.start(batch=2)
    nll_BT, state = adapter.losses(ids_BT, labels_BT, state)    # nats; the state goes on, logits exist for a piece only

`own.py` and `hf.py` implement it. Legend: B batch, T time, C tokens of a chunk, A tokens of an answer, D width, V vocabulary, G heads (or 1),
E entries of one head's state. Losses are in nats, lengths and positions in tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.tokenizer import TextCoder
from evals.adapters.trust import code_hash, names_code
from models.lm import check_ids
from models.prompt import prompt_of, whole_prompt

PIECE = 1024  # rows of logits alive at once
FIRST_WORDS = 300  # characters of a foreign library's message that are passed on


class ItemError(RuntimeError):
    """One measurement cannot be made; the message is the sentence that the report shows in its place."""


@dataclass
class LayerState:
    """One recurrent tensor of one layer.

    entries (B, G, E): the entries of each head in a row; shape: that of one head before it was made a row, e.g. (P, N) of a matrix state.
    """

    layer: int
    name: str
    entries: Tensor
    shape: tuple[int, ...]


def pieces(T: int, chunk: int, whole: int = 0) -> Iterator[tuple[int, int]]:
    """(first, last) token positions, last exclusive, of consecutive chunks that cover 0..T, the first of `whole` tokens at least.

    A last chunk of one token is joined to the one before it, as some libraries treat a single token as a decoding step with other code.
    """
    chunk = max(2, chunk)
    first = 0
    while first < T:
        last = min(first + (chunk if first else max(chunk, whole)), T)
        if T - last == 1:
            last = T
        yield first, last
        first = last


def not_finite(precision: str, where: str = "") -> str:
    """The sentence for logits that are NaN or infinite; where: words that say at which place."""
    if precision == "fp32":
        return f"The logits are not finite{where}, in fp32: the weights hold values that are not finite or grow without bound; take another checkpoint."
    return f"The logits are not finite{where}; try precision=fp32."


class Adapter:
    """What the evaluations need of a model. Subclasses say how it is run (the methods that raise NotImplementedError); no method takes gradients.

    `state` is whatever the subclass carries from one chunk to the next: nobody else looks inside.
    """

    name: str  # in reports
    folder: str  # where it was loaded from
    model: nn.Module
    device: torch.device
    vocab_size: int  # rows of its embedding
    coder: TextCoder | None = None  # None: there is no tokenizer, so the model reads token ids only
    kind = "?"  # which sort of model, in reports
    precision = "fp32"  # or bf16: matrix products under autocast
    train_length: int | None = None  # tokens of a training sequence, where known
    position_limit: int | None = None  # tokens that learned position embeddings allow; None: no such limit
    carry = "chunks"  # how its state goes on: in "chunks", in "steps" of one token, or "none": it reads whole sequences only
    whole_beyond: int | None = None  # tokens beyond which sequences are read whole all the same; None: however long, they are carried so
    trusted = False  # whether code of the folder was run
    after_chunk: Callable[[Any], Any] | None = None  # state -> state, between chunks: where cures act
    on_start: Callable[[], None] | None = None  # called when a new sequence begins: where cures forget the last one

    @property
    def prompt(self) -> int:
        """Tokens at the beginning of a text that the model sees whole (models/prompt.py): what it says of them there is no prediction."""
        return prompt_of(self.model)

    def start(self, batch: int) -> Any:
        """The state of `batch` sequences before their first token."""
        if self.on_start is not None:
            self.on_start()
        return self._start(batch)

    def _start(self, batch: int) -> Any:
        raise NotImplementedError

    def _hidden(self, ids_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads ids (B, T) after `state`: (what the head reads (B, T, D), the state after the last of them)."""
        raise NotImplementedError

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of what the head reads (..., D)."""
        raise NotImplementedError

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @torch.no_grad()
    def _wide_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden (..., D), in fp32 at least."""
        with self._autocast():
            logits = self._head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def layer_states(self, state: Any) -> list[LayerState]:
        """The recurrent tensors in `state`, as fp32 (fp64 of a double model); caches of attention are not among them."""
        return []

    def replace_states(self, state: Any, change: Callable[[int, str, Tensor], Tensor]) -> Any:
        """`state` with each recurrent tensor (B, ...) replaced by change(layer, name, tensor). Raises ItemError where that is not possible."""
        raise ItemError(f"{self.kind} does not let its states be changed.")

    def config_text(self) -> str:
        """The model's config as JSON."""
        config: Any = self.model.config
        return config.to_json_string() if hasattr(config, "to_json_string") else json.dumps(config.to_dict(), sort_keys=True, default=str)

    def content_hash(self) -> str:
        """SHA-256, in hexadecimal, of all that decides what the model says: weights, config, tokenizer, and code that its folder brings."""
        digest = hashlib.sha256(self.config_text().encode())
        for name, value in sorted(self.model.state_dict().items()):
            if isinstance(value, Tensor):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        if self.coder is not None:
            digest.update(f"{self.coder.tokenizer.to_str()} {self.coder.start_ids}".encode())
        digest.update(code_hash(Path(self.folder)).encode() if self.trusted else b"")
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a report says of the model, as a JSON-able dict."""
        return {
            "name": self.name,
            "folder": self.folder,
            "kind": self.kind,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocabulary": self.vocab_size,
            "train_length": self.train_length,
            "position_limit": self.position_limit,
            "carry": self.carry if self.whole_beyond is None else f"{self.carry} up to {self.whole_beyond:,} tokens, else none",
            "precision": self.precision,
        }

    def need_coder(self) -> TextCoder:
        """The coder between text and ids. Raises ItemError where there is none."""
        if self.coder is None:
            if not self.trusted and names_code(Path(self.folder) / "tokenizer_config.json"):
                raise ItemError(
                    f"The tokenizer of {self.folder} is code of its own, which this program runs only when told to: read it, then add trust_remote_code=true."
                )
            raise ItemError(
                f"{self.folder} holds no tokenizer that can be read, so texts cannot be made into tokens; put a tokenizer.json beside the weights."
            )
        return self.coder

    def reads_whole(self, T: int) -> bool:
        """Whether a sequence of T tokens has to be read in one call."""
        return self.carry == "none" or self.whole_beyond is not None and T > self.whole_beyond

    def check_length(self, T: int) -> None:
        """Raises ItemError where this model cannot read a sequence of T tokens."""
        if self.position_limit is not None and T > self.position_limit:
            raise ItemError(f"{T:,} tokens are more than the {self.position_limit:,} positions the model has; ask for shorter lengths.")
        if self.reads_whole(T) and T > 1 << 15:
            where = "" if self.carry == "none" else f" beyond {self.whole_beyond:,} tokens, where its positions stretch"
            raise ItemError(f"This model cannot carry its state between chunks{where}, and {T:,} tokens at once are too many.")

    def _run(self, ids_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(what the head reads (B, T, D), state after the chunk and what a cure makes of it)."""
        if not ids_BT.is_cuda:  # what was drawn on the device is in the vocabulary
            check_ids(ids_BT, self.vocab_size)
        ids_BT = ids_BT.to(self.device)
        with torch.no_grad(), self._autocast():
            if self.carry == "steps" and ids_BT.shape[1] > 1:
                parts = []
                for t in range(ids_BT.shape[1]):
                    part, state = self._hidden(ids_BT[:, t : t + 1], state)
                    parts.append(part)
                hidden = torch.cat(parts, 1)
            else:
                hidden, state = self._hidden(ids_BT, state)
        return hidden, self.after_chunk(state) if self.after_chunk is not None else state

    def advance(self, ids_BT: Tensor, state: Any) -> Any:
        """The state after reading ids (B, T)."""
        return self._run(ids_BT, state)[1]

    def logits(self, ids_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(logits (B, T, V) in fp32 at least, state). For short chunks: all of them lie in memory at once."""
        hidden, state = self._run(ids_BT, state)
        return self._wide_logits(hidden), state

    def losses(self, ids_BT: Tensor, labels_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(nats of each label (B, T), 0 where the label is -100; state). Raises ItemError for values that are not finite."""
        if not labels_BT.is_cuda:
            check_ids(labels_BT, self.vocab_size)
        hidden, state = self._run(ids_BT, state)
        rows, labels = hidden.flatten(0, 1), labels_BT.to(self.device).flatten()
        with torch.no_grad():
            nll = torch.cat(
                [
                    F.cross_entropy(self._wide_logits(rows[a : a + PIECE]), labels[a : a + PIECE], reduction="none")
                    for a in range(0, rows.shape[0], PIECE)
                ]
            ).view_as(labels_BT)
        if not bool(torch.isfinite(nll).all()):
            place = int((~torch.isfinite(nll)).any(0).nonzero()[0])
            raise ItemError(self.not_finite(f" (first at token {place} of a chunk of {nll.shape[1]})"))
        return nll, state

    def stream(self, ids_BT: Tensor, chunk: int, each: Callable[[int, Tensor, Any], None], batch_state: Any = None) -> Any:
        """Feeds ids (B, T+1) in chunks of `chunk` tokens with carried state, and scores all but the first; returns the last state.

        After every chunk each(position of its first token, nats (B, C), state) is called. batch_state: what to begin with, instead of `start`.
        Of a prompt that the model sees whole nothing is scored. Raises ItemError as `check_length` and `losses` do.
        """
        T, prompt = ids_BT.shape[1] - 1, self.prompt if batch_state is None else 0
        self.check_length(T)
        if prompt > T:
            raise ItemError(f"A text of {T:,} tokens lies within the prompt of {prompt:,} that this model sees whole; ask for longer ones.")
        if self.after_chunk is not None and self.reads_whole(T):
            raise ItemError(f"This cure acts between chunks, and {T:,} tokens of this model are read at once; ask for shorter lengths.")
        state = self.start(ids_BT.shape[0]) if batch_state is None else batch_state
        for first, last in pieces(T, T if self.reads_whole(T) else chunk, prompt):
            nll_BC, state = self.losses(ids_BT[:, first:last], ids_BT[:, first + 1 : last + 1], state)
            told = max(0, prompt - 1 - first)
            if told < nll_BC.shape[1]:
                each(first + told, nll_BC[:, told:], state)
        return state

    def prefill(self, ids_BT: Tensor, chunk: int, state: Any = None) -> tuple[Tensor, Any]:
        """(logits (B, V) after the last token, state), fed in chunks of `chunk` tokens. Raises ItemError for logits that are not finite."""
        T = ids_BT.shape[1]
        self.check_length(T)
        whole = state is None and self.prompt > 0  # then all of it is the prompt
        state = self.start(ids_BT.shape[0]) if state is None else state
        hidden = None
        with whole_prompt(self.model, T) if whole else contextlib.nullcontext():
            for first, last in [(0, T)] if whole or self.reads_whole(T) else pieces(T, chunk):
                hidden, state = self._run(ids_BT[:, first:last], state)
        assert hidden is not None
        return self._finite(self._wide_logits(hidden[:, -1])), state

    def not_finite(self, where: str = "") -> str:
        """`not_finite` in this adapter's precision."""
        return not_finite(self.precision, where)

    def _finite(self, logits: Tensor) -> Tensor:
        if not bool(torch.isfinite(logits).all()):
            raise ItemError(self.not_finite())
        return logits

    def hits(self, prompt_BT: Tensor, answer_BA: Tensor, chunk: int) -> Tensor:
        """(B,) bool: whether greedy decoding after the prompt would write the answer (-100 pads it), told by one teacher-forced pass.

        Greedy decoding writes a_1..a_n exactly when each a_i is the argmax after prompt, a_1 .. a_{i-1}: the same context in both.
        """
        A = answer_BA.shape[1]
        answer_BA = answer_BA.to(self.device)
        if self.reads_whole(prompt_BT.shape[1] + A - 1):
            whole = torch.cat([prompt_BT.to(self.device), answer_BA[:, :-1].clamp(min=0)], 1)
            self.check_length(whole.shape[1])
            hidden, _ = self._run(whole, self.start(whole.shape[0]))
            predicted = self._finite(self._wide_logits(hidden[:, -A:])).argmax(-1)
        else:
            first, state = self.prefill(prompt_BT, chunk)
            predicted = first.argmax(-1)[:, None]
            if A > 1:
                after, _ = self.logits(answer_BA[:, :-1].clamp(min=0), state)
                predicted = torch.cat([predicted, self._finite(after).argmax(-1)], 1)
        return ((predicted == answer_BA) | (answer_BA == -100)).all(1).cpu()

    def greedy(self, prompt_BT: Tensor, new_tokens: int, chunk: int) -> Tensor:
        """(B, new_tokens): the ids that greedy decoding writes after the prompt, on the CPU."""
        if self.reads_whole(prompt_BT.shape[1] + new_tokens - 1):
            ids = prompt_BT.to(self.device)
            for _ in range(new_tokens):
                logits, _ = self.prefill(ids, chunk)
                ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
            return ids[:, prompt_BT.shape[1] :].cpu()
        logits_BV, state = self.prefill(prompt_BT, chunk)
        written = [logits_BV.argmax(-1)]
        for _ in range(new_tokens - 1):
            logits, state = self.logits(written[-1][:, None], state)
            written.append(logits[:, -1].argmax(-1))
        return torch.stack(written, 1).cpu()


# Caches of transformers and of others' code declare nothing: what grows with the text, or is the last inputs of a convolution, tells by its name.
NOT_RECURRENT = ("conv", "k_", "v_", "keys", "values", "segment", "seen", "position")


def recurrent_fields(cache: Any) -> list[str]:
    """Names of the recurrent tensors in a dataclass of others' code."""
    if not dataclasses.is_dataclass(cache):
        return []
    return [
        f.name
        for f in dataclasses.fields(cache)
        if not f.name.startswith(NOT_RECURRENT)
        and isinstance(v := getattr(cache, f.name), Tensor)
        and v.is_floating_point()
        and v.ndim >= 2
    ]


def as_heads(layer: int, name: str, tensor: Tensor) -> LayerState:
    """A recurrent tensor by heads: (B, H, P, N) is H heads of a (P, N) matrix, (B, H, N) is H heads of a vector, (B, D) is one head."""
    x = tensor.detach()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim == 2:
        x = x[:, None]
    return LayerState(layer, name, x.flatten(2), tuple(x.shape[2:]))


def first_words(error: BaseException) -> str:
    """An error's message in one line, cut after FIRST_WORDS characters; the name of its class where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= FIRST_WORDS else text[:FIRST_WORDS] + " ..."


def total_variation(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """(B,), from 0 to 1: half the L1 distance of the two distributions whose logits (B, V) are given."""
    return 0.5 * (p_logits.double().softmax(-1) - q_logits.double().softmax(-1)).abs().sum(-1)


def perplexity(nats: float) -> float:
    """exp of nats per token; nats above 700 count as 700, so that the figure stays finite."""
    return math.exp(min(700.0, nats))
