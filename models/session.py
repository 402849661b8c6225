"""A text that a model has read and goes on with: the carried state, all ids, and the generator of the draws.

    session = Session(model, ids_BT)         # reads nothing yet
    session.read()                           # all but the last token, in chunks
    question = session.copy().append(ids)    # the text read so far is not read again
    new_ids = question.generate(100, Sampling(temperature=0))
    question.save("talk.session")            # and later: Session.load("talk.session", model)

Rows of different lengths are padded on the left. Padding is a segment of its own (0, the text 1), which no mixer sees across, so that a
padded row goes on as it would alone. Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import UserError, reason_of
from data.files import save_tensors
from models.decode import Decoder
from models.lm import LanguageModel, LMState, check_ids
from models.prompt import read_at_once
from models.sampling import Sampling

CHUNK = 2048  # tokens read at once
GRAPH_FROM = 16  # new tokens from which capturing a step is worth while


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None) -> tuple[Tensor, list[int]]:
    """(ids (B, T), the length of each row): the prompts flush right. Raises ValueError for an empty one."""
    lengths = [len(p) for p in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError("The prompt must hold at least one token.")
    rows = [[pad_id] * (max(lengths) - len(p)) + list(p) for p in prompts]
    return torch.tensor(rows, dtype=torch.long, device=device), lengths


class Session:
    """The state has read the tokens of `ids_BT` before `read_to`. At least the last token is always unread, as its logits choose the next
    one."""

    def __init__(self, model: LanguageModel, ids_BT: Tensor, lengths: Sequence[int] | None = None, seed: int = 0) -> None:
        """ids (B, T) int64; lengths: row b is its last lengths[b] ids, what stands before is padding. Raises ValueError for an empty row or lengths that are
        not those of the rows, UserError for ids that the model does not have."""
        if ids_BT.ndim != 2 or not ids_BT.numel() or (lengths is not None and min(lengths, default=0) < 1):
            raise ValueError("The prompt must hold at least one token.")
        if lengths is not None and (len(lengths) != len(ids_BT) or max(lengths) > ids_BT.shape[1]):
            raise ValueError(
                f"lengths must name {len(ids_BT)} numbers of tokens, one a row and at most {ids_BT.shape[1]}, not {list(lengths)}."
            )
        check_ids(ids_BT, model.config.vocab_size)
        self.model, self.ids_BT = model, ids_BT
        B, T = ids_BT.shape
        self.padding = [0] * B if lengths is None else [T - n for n in lengths]
        self.state = model.init_state(B)
        self.read_to = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.torn = False  # `generate` has not come to its end: the state is none that goes with the ids

    def _refuse_torn(self) -> None:
        if self.torn:
            raise UserError("The session broke off while it generated, and cannot go on; load it again, or begin a new one.")

    def append(self, ids_BT: Tensor) -> Session:
        """Adds text to the end of every row; it is read later, by `read` or `generate`."""
        self._refuse_torn()
        check_ids(ids_BT, self.model.config.vocab_size)
        self.ids_BT = torch.cat([self.ids_BT, ids_BT.to(self.ids_BT)], 1)
        return self

    def copy(self) -> Session:
        """Another session that goes on from here. The states are shared: no mixer writes into what an earlier state holds."""
        self._refuse_torn()
        other = Session.__new__(Session)
        other.__dict__.update(self.__dict__)
        other.padding = list(self.padding)
        other.generator = torch.Generator()
        other.generator.set_state(self.generator.get_state())
        return other

    @torch.no_grad()
    def read(self, progress: Callable[[int, int], None] | None = None) -> Session:
        """Brings the state up to the last token. progress(tokens read, tokens of the text) is called after each chunk."""
        self._refuse_torn()
        last = self.ids_BT.shape[1] - 1
        chunk = max(CHUNK, self._first_call())
        while self.read_to < last:
            self._feed(min(self.read_to + chunk, last))
            if progress is not None:
                progress(self.read_to, last + 1)
        return self

    def _first_call(self) -> int:
        """Tokens that have to be read at once, padding and, where it lies within, the last one of the text among them."""
        T, first = self.ids_BT.shape[1], read_at_once(self.model, self.ids_BT.shape[1])
        return min(T, first + max(self.padding)) if first else 0

    def _feed(self, end: int) -> Tensor:
        """Reads up to `end`; the logits (B, V) after the last token of it."""
        piece = self.ids_BT[:, self.read_to : end]
        segments = None
        if 0 < max(self.padding) and self.read_to <= max(self.padding):  # later tokens go on with the segment before them
            place = torch.arange(self.read_to, end, device=piece.device)
            segments = (place >= torch.tensor(self.padding, device=piece.device)[:, None]).to(torch.int32)
        return self._step(piece, segments)

    def _step(self, piece_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        output = self.model(piece_BT, state=self.state, segment_ids=segments_BT, last_only=True)
        assert output.logits is not None and output.state is not None
        self.state = output.state
        self.read_to += piece_BT.shape[1]
        return output.logits[:, -1]

    def _seen(self, vocab_size: int) -> Tensor:
        """(B, V) bool: the tokens each row holds, padding left out."""
        place = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        real = place >= torch.tensor(self.padding, device=place.device)[:, None]
        ids = torch.where(real, self.ids_BT, self.ids_BT[:, -1:])
        return torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)

    @torch.no_grad()
    def generate(
        self,
        max_new_tokens: int,
        sampling: Sampling,
        *,
        stop_ids: Sequence[int] = (),
        fill_id: int | None = None,
        stop_when: Callable[[int, int], bool] | None = None,
        on_token: Callable[[Tensor], None] | None = None,
        graph: bool | None = None,
    ) -> Tensor:
        """The new ids (B, n), n <= max_new_tokens, also appended to the session.

        A row ends with one of stop_ids, or when stop_when(row, token) says so; it goes on with fill_id (the first stop id unless given)
        until all rows have ended. Raises UserError for logits that are not finite, at the first token or once the last is drawn; those that a row has
        behind its end do not count. A session in which anything was raised refuses to go on. on_token is given each step's ids (B,). graph: steps
        are those of models.decode.Decoder, a CUDA graph; None: on a GPU, where the text is long enough to repay the capture.
        """
        stops = torch.tensor(list(stop_ids), dtype=torch.long, device=self.ids_BT.device)
        fill = fill_id if fill_id is not None else stop_ids[0] if len(stop_ids) else 0
        done_B = torch.zeros(len(self.ids_BT), dtype=torch.bool, device=self.ids_BT.device)
        ending = len(stop_ids) > 0 or stop_when is not None
        seen_BV = self._seen(self.model.config.vocab_size) if sampling.repetition_penalty != 1 else None
        if self.read_to or self._first_call() < self.ids_BT.shape[1]:
            self.read()
        self.torn = True
        new: list[Tensor] = []
        decoder: Decoder | None = None
        sound_B = ~done_B
        graph = self.ids_BT.is_cuda and max_new_tokens >= GRAPH_FROM if graph is None else graph
        for _ in range(max_new_tokens):
            if not new:
                logits_BV = self._feed(self.ids_BT.shape[1])
                refuse_not_finite(finite(logits_BV))
            elif graph:
                decoder = decoder or Decoder(self.model, self.state, self.ids_BT.shape[1] + max_new_tokens)
                logits_BV = decoder.step(new[-1])
                self.read_to += 1
            else:
                logits_BV = self._step(new[-1][:, None])
            if ending and len(done_B) > 1:
                sound_B &= done_B | finite(logits_BV)
            token_B = sampling.draw(logits_BV, self.generator, seen_BV)
            token_B = torch.where(done_B, torch.full_like(token_B, fill), token_B)
            new.append(token_B)
            if seen_BV is not None:
                seen_BV.scatter_(1, token_B[:, None], True)
            if on_token is not None:
                on_token(token_B)
            if len(stop_ids):
                done_B = done_B | torch.isin(token_B, stops)
            if stop_when is not None:
                said = [done or stop_when(row, int(t)) for row, (done, t) in enumerate(zip(done_B.tolist(), token_B.tolist()))]
                done_B = torch.tensor(said, device=done_B.device)
            if ending and bool(done_B.all()):
                break
        if new:
            refuse_not_finite(sound_B if ending and len(done_B) > 1 else finite(logits_BV))
        if decoder is not None:
            self.state = decoder.release()
        new_BN = torch.stack(new, 1) if new else self.ids_BT[:, :0]
        self.ids_BT, self.torn = torch.cat([self.ids_BT, new_BN], 1), False
        return new_BN

    def save(self, path: str | Path) -> None:
        """One safetensors file: the state, the ids and the generator, with a JSON header. Raises UserError when it cannot be written, and where a file lies
        there that is no session."""
        path = Path(path)
        self._refuse_torn()
        refuse_what_is_no_session(path)
        tensors = {"ids": self.ids_BT, "generator": self.generator.get_state()}
        plain: list[dict[str, int | None]] = []
        for i, part in enumerate(self.state.layers):
            values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
            tensors |= {f"layers.{i}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
            plain.append({name: value for name, value in values.items() if not isinstance(value, Tensor)})
        header = {
            "format": 1,
            "model": model_hash(self.model),
            "tokens": self.ids_BT.shape[1],
            "read_to": self.read_to,
            "padding": self.padding,
            "layers": plain,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            whole = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            save_tensors(temporary, whole, {"everywhen_session": json.dumps(header)})
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"The session {path} cannot be written: {reason_of(error)}; or choose another file.") from error

    @staticmethod
    def load(path: str | Path, model: LanguageModel) -> Session:
        """The session of a file. Raises UserError in one sentence for a torn file, one that holds none, or another model's."""
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("everywhen_session", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"The session {path} cannot be read: {getattr(error, 'strerror', None) or error}; save it again.") from error
        if not isinstance(header, dict) or header.get("format") != 1:
            raise UserError(f"{path} holds no session; give a file that save= wrote.")
        if header["model"] != model_hash(model):
            raise UserError(
                f"The session {path} belongs to another model, or to this one in another precision; give the checkpoint and the precision that it was"
                " saved with."
            )
        device = model.embedding.weight.device
        session = Session(model, tensors["ids"].to(device))
        layers = []
        for i, (empty, plain) in enumerate(zip(session.state.layers, header["layers"])):
            layer_tensors = {name.split(".", 2)[2]: t.to(device) for name, t in tensors.items() if name.startswith(f"layers.{i}.")}
            layers.append(dataclasses.replace(empty, **layer_tensors, **plain))
        session.state, session.read_to, session.padding = LMState(layers), header["read_to"], header["padding"]
        session.generator.set_state(tensors["generator"])
        return session


def refuse_what_is_no_session(path: Path) -> None:
    """Raises UserError where a file that a session would be written over is none: a text, say, that was meant to be read."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        if b"everywhen_session" not in file.read(1 << 16):
            raise UserError(f"{path} exists and is no session, so it is not written over; give another file.")


def finite(logits_BV: Tensor) -> Tensor:
    """(B,) bool: whether a row's largest logit is a number, which any NaN of the row makes it not: what is drawn from it would mean nothing."""
    return logits_BV.amax(-1).isfinite()


def refuse_not_finite(finite_B: Tensor) -> None:
    """Raises UserError where a row's logits are not `finite`."""
    if not bool(finite_B.all()):
        raise UserError(
            "The logits are not finite: the weights hold values that are not finite, or a state grew without bound; take another checkpoint, or"
            " precision=fp32."
        )


def model_hash(model: LanguageModel) -> str:
    """SHA-256 of the model's config and of some of every parameter's values: another training of the same shape is another model."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        some = values[:: max(1, values.numel() // 16)][:17].to("cpu", torch.float64)
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()
