"""One small interface over every model that can be evaluated: our checkpoints and any Hugging Face causal language model on disk.

    adapter = load_adapter("runs/quickstart", "cpu")            # or a folder for transformers.AutoModelForCausalLM
    state = adapter.start(batch=2)
    nll_BT, state = adapter.losses(ids_BT, labels_BT, state)    # nats; the state goes on, logits exist for a piece only

How a foreign model carries its state is not believed but tried: on loading, a short random sequence is fed whole and in pieces, and the
way of feeding that gives the same logits is used ("chunks", else "steps" of one token, else "none": whole sequences only).
Legend: B batch, T time, V vocabulary, G heads (or 1), E entries of one head's state.
"""

from __future__ import annotations

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

from data.tokenizer import TextCoder, coder_of
from evals.adapters.trust import code_hash, may_run_code, names_code
from models.hub.weights import Weights
from training.errors import UserError

PIECE = 1024  # rows of logits alive at once
# What outputs call the cache, and with it the argument that takes it back; the newest name first, as older ones live on as aliases of outputs only.
CACHES = ("cache", "past_key_values", "cache_params", "state")
FIRST_WORDS = 300  # characters of a foreign library's message that are passed on


class ItemError(RuntimeError):
    """One measurement cannot be made; its message is the sentence the report shows."""


@dataclass
class LayerState:
    """The recurrent state of one layer. entries (B, G, E): one row per head; shape: of one head, (P, N) for a matrix state."""

    layer: int
    name: str
    entries: Tensor
    shape: tuple[int, ...]


def pieces(T: int, chunk: int) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive chunks that cover 0..T; a last chunk of one token is joined to the one before it, as some libraries
    treat a single token as a decoding step with other code."""
    chunk = max(2, chunk)
    first = 0
    while first < T:
        last = min(first + chunk, T)
        if T - last == 1:
            last = T
        yield first, last
        first = last


class Adapter:
    """What the evaluations need of a model. Subclasses say how it is run; all methods are without gradient."""

    name: str
    folder: str
    vocab_size: int
    coder: TextCoder | None = None
    train_length: int | None = None  # tokens of a training sequence, where known
    position_limit: int | None = None  # hard limit: learned position embeddings
    carry = "chunks"
    kind = "?"
    model: nn.Module
    device: torch.device
    precision = "fp32"
    after_chunk: Callable[[Any], Any] | None = None  # cures act on the state between chunks
    trusted = False  # whether code of the folder was run
    on_start: Callable[[], None] | None = None  # cures that keep something of their own forget it here

    def start(self, batch: int) -> Any:
        """The empty state of `batch` sequences."""
        if self.on_start is not None:
            self.on_start()
        return self._start(batch)

    def _start(self, batch: int) -> Any:
        raise NotImplementedError

    def _hidden(self, ids_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(what the head reads (B, T, D), the next state)."""
        raise NotImplementedError

    def _head(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def layer_states(self, state: Any) -> list[LayerState]:
        """The recurrent states in `state`, fp32 (fp64 for a double model); caches of attention are not among them."""
        return []

    def replace_states(self, state: Any, change: Callable[[int, str, Tensor], Tensor]) -> Any:
        """`state` with every recurrent tensor replaced by change(layer, name, tensor)."""
        raise ItemError(f"{self.kind} does not let its states be changed.")

    def config_text(self) -> str:
        """The model's config as JSON."""
        config: Any = self.model.config
        return config.to_json_string() if hasattr(config, "to_json_string") else json.dumps(config.to_dict(), sort_keys=True, default=str)

    def content_hash(self) -> str:
        """Of all that decides what the model says: every value of its weights, its config, its tokenizer and code from its folder."""
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
        """What a report says of the model."""
        return {
            "name": self.name,
            "folder": self.folder,
            "kind": self.kind,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocabulary": self.vocab_size,
            "train_length": self.train_length,
            "position_limit": self.position_limit,
            "carry": self.carry,
            "precision": self.precision,
        }

    def need_coder(self) -> TextCoder:
        """The coder. Raises ItemError where there is none."""
        if self.coder is None:
            if not self.trusted and names_code(Path(self.folder) / "tokenizer_config.json"):
                raise ItemError(
                    f"The tokenizer of {self.folder} is code of its own, which this program runs only when told to: read it, then add trust_remote_code=true."
                )
            raise ItemError(
                f"{self.folder} holds no tokenizer that can be read, so texts cannot be made into tokens; put a tokenizer.json beside the weights."
            )
        return self.coder

    def check_length(self, T: int) -> None:
        """Raises ItemError for a sequence of T tokens that this model cannot read."""
        if self.position_limit is not None and T > self.position_limit:
            raise ItemError(f"{T:,} tokens are more than the {self.position_limit:,} positions the model has; ask for shorter lengths.")
        if self.carry == "none" and T > 1 << 15:
            raise ItemError(f"This model cannot carry its state between chunks, and {T:,} tokens at once are too many.")

    def _run(self, ids_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if self.carry == "steps" and ids_BT.shape[1] > 1:
                parts = []
                for t in range(ids_BT.shape[1]):
                    hidden, state = self._hidden(ids_BT[:, t : t + 1], state)
                    parts.append(hidden)
                hidden = torch.cat(parts, 1)
            else:
                hidden, state = self._hidden(ids_BT, state)
        return hidden, self.after_chunk(state) if self.after_chunk is not None else state

    def advance(self, ids_BT: Tensor, state: Any) -> Any:
        """The state after ids."""
        return self._run(ids_BT.to(self.device), state)[1]

    def logits(self, ids_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(logits (B, T, V) in fp32, state); for short pieces only."""
        hidden, state = self._run(ids_BT.to(self.device), state)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            result = self._head(hidden)
        return result.to(torch.promote_types(result.dtype, torch.float32)), state

    def losses(self, ids_BT: Tensor, labels_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(nats of each label (B, T), 0 where it is -100; state). Raises ItemError for values that are not finite."""
        hidden, state = self._run(ids_BT.to(self.device), state)
        rows, labels = hidden.flatten(0, 1), labels_BT.to(self.device).flatten()
        found = []
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            for a in range(0, rows.shape[0], PIECE):
                z = self._head(rows[a : a + PIECE])
                found.append(F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), labels[a : a + PIECE], reduction="none"))
        nll = torch.cat(found).view_as(labels_BT)
        if not bool(torch.isfinite(nll).all()):
            place = int((~torch.isfinite(nll)).any(0).nonzero()[0])
            raise ItemError(self.not_finite(f" (first at token {place} of a chunk of {nll.shape[1]})"))
        return nll, state

    def stream(self, ids_BT: Tensor, chunk: int, each: Callable[[int, Tensor, Any], None], batch_state: Any = None) -> Any:
        """Feeds ids (B, T+1) in chunks with carried state; each(first position, nll (B, C), state) after every chunk. Returns the state."""
        T = ids_BT.shape[1] - 1
        self.check_length(T)
        state = self.start(ids_BT.shape[0]) if batch_state is None else batch_state
        for first, last in pieces(T, T if self.carry == "none" else chunk):
            nll, state = self.losses(ids_BT[:, first:last], ids_BT[:, first + 1 : last + 1], state)
            each(first, nll, state)
        return state

    def prefill(self, ids_BT: Tensor, chunk: int, state: Any = None) -> tuple[Tensor, Any]:
        """(logits (B, V) after the last token, state), in chunks."""
        T = ids_BT.shape[1]
        self.check_length(T)
        state = self.start(ids_BT.shape[0]) if state is None else state
        if self.carry == "none":
            hidden, state = self._run(ids_BT.to(self.device), state)
            return self._finite(self._head_last(hidden)), state
        hidden = None
        for first, last in pieces(T, chunk):
            hidden, state = self._run(ids_BT[:, first:last].to(self.device), state)
        assert hidden is not None
        return self._finite(self._head_last(hidden)), state

    def _head_last(self, hidden: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            result = self._head(hidden[:, -1])
        return result.to(torch.promote_types(result.dtype, torch.float32))

    def not_finite(self, where: str = "") -> str:
        """The sentence for logits that are no numbers."""
        if self.precision == "fp32":
            return f"The logits are not finite{where}, in fp32: the weights hold values that are not finite or grow without bound; take another checkpoint."
        return f"The logits are not finite{where}; try precision=fp32."

    def _finite(self, logits: Tensor) -> Tensor:
        if not bool(torch.isfinite(logits).all()):
            raise ItemError(self.not_finite())
        return logits

    def hits(self, prompt_BT: Tensor, answer_BA: Tensor, chunk: int) -> Tensor:
        """(B,) bool: whether greedy decoding after the prompt would write the answer (-100 pads it), found by one teacher-forced pass.

        Greedy decoding writes a_1..a_n exactly when each a_i is the argmax after prompt, a_1 .. a_{i-1}: the same context in both.
        """
        A = answer_BA.shape[1]
        answer_BA = answer_BA.to(self.device)
        if self.carry == "none":
            whole = torch.cat([prompt_BT.to(self.device), answer_BA[:, :-1].clamp(min=0)], 1)
            self.check_length(whole.shape[1])
            hidden, _ = self._run(whole, self.start(whole.shape[0]))
            with torch.no_grad():
                predicted = self._finite(self._head(hidden[:, -A:]).float()).argmax(-1)
        else:
            first, state = self.prefill(prompt_BT, chunk)
            predicted = first.argmax(-1)[:, None]
            if A > 1:
                after, _ = self.logits(answer_BA[:, :-1].clamp(min=0), state)
                predicted = torch.cat([predicted, self._finite(after).argmax(-1)], 1)
        return ((predicted == answer_BA) | (answer_BA == -100)).all(1).cpu()

    def greedy(self, prompt_BT: Tensor, new_tokens: int, chunk: int) -> Tensor:
        """The next `new_tokens` argmax tokens (B, n)."""
        if self.carry == "none":
            ids = prompt_BT.to(self.device)
            for _ in range(new_tokens):
                logits, _ = self.prefill(ids, chunk)
                ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
            return ids[:, prompt_BT.shape[1] :].cpu()
        logits_BV, state = self.prefill(prompt_BT, chunk)
        found = [logits_BV.argmax(-1)]
        for _ in range(new_tokens - 1):
            logits, state = self.logits(found[-1][:, None], state)
            found.append(logits[:, -1].argmax(-1))
        return torch.stack(found, 1).cpu()


# Fields of a state that grow with the text, or are the last inputs of a convolution, are no recurrent state.
NOT_RECURRENT = ("conv", "k_", "v_", "keys", "values", "segment", "seen", "position")


def recurrent_fields(state: Any) -> list[str]:
    """Names of the recurrent tensors of a mixer's state dataclass."""
    if not dataclasses.is_dataclass(state):
        return []
    return [
        f.name
        for f in dataclasses.fields(state)
        if not f.name.startswith(NOT_RECURRENT)
        and isinstance(v := getattr(state, f.name), Tensor)
        and v.is_floating_point()
        and v.ndim >= 2
    ]


def as_heads(layer: int, name: str, tensor: Tensor) -> LayerState:
    """(B, H, P, N) -> H heads of a (P, N) matrix; (B, D) -> one head. Anything else with three dimensions: heads of vectors."""
    x = tensor.detach()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim == 2:
        x = x[:, None]
    return LayerState(layer, name, x.flatten(2), tuple(x.shape[2:]))


class OwnAdapter(Adapter):
    """A models.lm.LanguageModel."""

    kind = "everywhen"

    def __init__(self, model: Any, coder: TextCoder | None, name: str, folder: str, precision: str = "fp32") -> None:
        self.model, self.coder, self.name, self.folder, self.precision = model.eval(), coder, name, folder, precision
        self.vocab_size, self.device = model.config.vocab_size, model.embedding.weight.device

    def _start(self, batch: int) -> Any:
        model: Any = self.model
        return model.init_state(batch)

    def _hidden(self, ids_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        from models.lm import LMState

        model: Any = self.model
        x = model.embedding(ids_BT)
        layers = []
        for block, before in zip(model.blocks, state.layers):
            x, after = block(x, before, None)
            layers.append(after)
        return model.norm(x), LMState(layers)

    def _head(self, hidden: Tensor) -> Tensor:
        model: Any = self.model
        return model.head(hidden)

    def layer_states(self, state: Any) -> list[LayerState]:
        found = []
        for layer, part in enumerate(state.layers):
            for name in recurrent_fields(part):
                tensor = getattr(part, name)
                if name.startswith("cell"):  # (B, S, I): one named vector a state of the cell
                    model: Any = self.model
                    for i, which in enumerate(model.blocks[layer].mixer.cell.state):
                        found.append(as_heads(layer, which, tensor[:, i]))
                else:
                    found.append(as_heads(layer, name.split("_")[0], tensor))
        return found

    def replace_states(self, state: Any, change: Callable[[int, str, Tensor], Tensor]) -> Any:
        from models.lm import LMState

        layers = []
        for layer, part in enumerate(state.layers):
            names = recurrent_fields(part)
            layers.append(dataclasses.replace(part, **{n: change(layer, n, getattr(part, n)) for n in names}) if names else part)
        return LMState(layers)


class HFAdapter(Adapter):
    """A transformers causal language model: backbone and head are called apart, where that gives the model's own logits."""

    def __init__(self, model: Any, coder: TextCoder | None, name: str, folder: str, precision: str = "fp32") -> None:
        self.model, self.coder, self.name, self.folder, self.precision = model.eval(), coder, name, folder, precision
        self.kind = f"transformers {type(model).__name__}"
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.device = next(model.parameters()).device
        self.position_limit = self._hard_limit()
        self.split_head = self._head_apart()
        self.carry = self._how_to_carry()

    def _hard_limit(self) -> int | None:
        limit = getattr(self.model.config, "max_position_embeddings", None) or getattr(self.model.config, "n_positions", None)
        tables = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == limit]
        model: Any = self.model
        return int(limit) if limit and any(m is not model.get_input_embeddings() for m in tables) else None

    @property
    def _backbone(self) -> Any:
        model: Any = self.model
        return getattr(model, getattr(model, "base_model_prefix", "") or "model", None)

    def _probe_ids(self, T: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(min(self.vocab_size, 1000), (1, T), generator=generator).to(self.device)

    @torch.no_grad()
    def _head_apart(self) -> bool:
        model, backbone = self.model, self._backbone
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if backbone is None or backbone is model or head is None:
            return False
        ids = self._probe_ids(7)
        try:
            hidden = backbone(input_ids=ids)[0]
            return bool(
                torch.allclose(head(hidden.to(head.weight.dtype)).float(), model(input_ids=ids).logits.float(), rtol=1e-3, atol=1e-4)
            )
        except Exception:
            return False

    @torch.no_grad()
    def _how_to_carry(self) -> str:
        ids = self._probe_ids(23)
        try:
            whole = self.model(input_ids=ids).logits.float()
        except Exception as error:
            raise UserError(f"{self.folder} was loaded but does not run: {first_words(error)}") from error
        scale = 1e-3 * float(whole.abs().max()) + 1e-5
        if self.precision == "bf16" or whole.dtype != torch.float32 or next(self.model.parameters()).dtype != torch.float32:
            scale *= 20
        for way, cuts in (("chunks", (0, 9, 11, 12, 23)), ("steps", tuple(range(24)))):
            try:
                state, parts = self._start(1), []
                for a, b in zip(cuts, cuts[1:]):
                    hidden, state = self._hidden(ids[:, a:b], state)
                    parts.append(self._head(hidden).float())
                if float((torch.cat(parts, 1) - whole).abs().max()) <= scale:
                    return way
            except Exception:
                continue
        return "none"

    def _start(self, batch: int) -> Any:
        """Models with a cache object of their own make it on the first call."""
        return None

    def _hidden(self, ids_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        keywords: dict[str, Any] = {"use_cache": self.carry != "none"}
        if state is not None:
            keywords[state[0]] = state[1]
        target = self._backbone if self.split_head else self.model
        output = target(input_ids=ids_BT, **keywords)
        cache = next(((key, value) for key in CACHES if (value := getattr(output, key, None)) is not None), None)
        return (output[0] if self.split_head else output.logits), cache

    def _head(self, hidden: Tensor) -> Tensor:
        if not self.split_head:
            return hidden  # already logits
        model: Any = self.model
        head = model.get_output_embeddings()
        return head(hidden if torch.is_autocast_enabled(self.device.type) else hidden.to(head.weight.dtype))

    def _tensors(self, state: Any) -> list[tuple[int, str, Any, Any]]:
        """(layer, name, holder, key) of recurrent tensors in a cache: transformers' linear-attention layers, dataclasses of mixers,
        or attributes that hold one tensor a layer (older caches, e.g. `ssm_states`)."""
        if state is None:
            return []
        cache: Any = state[1]
        found: list[tuple[int, str, Any, Any]] = []
        parts = getattr(cache, "layers", None)
        for layer, part in enumerate(parts if isinstance(parts, (list, tuple)) else []):
            held = getattr(part, "recurrent_states", None)
            if isinstance(held, dict):
                found += [(layer, "recurrent", held, key) for key, value in held.items() if isinstance(value, Tensor)]
            elif isinstance(held, Tensor):
                found.append((layer, "recurrent", part, "recurrent_states"))
            else:
                found += [(layer, name.split("_")[0], part, name) for name in recurrent_fields(part)]
        for name in ("ssm_states", "recurrent_states"):
            held = getattr(cache, name, None)
            if isinstance(held, Tensor):
                found += [(layer, name, held, layer) for layer in range(held.shape[0])]
            elif isinstance(held, (list, dict)):
                keys: list[Any] = list(range(len(held))) if isinstance(held, list) else list(held)
                found += [(int(key), name, held, key) for key in keys if isinstance(held[key], Tensor)]
        return found

    def layer_states(self, state: Any) -> list[LayerState]:
        return [as_heads(layer, name, _get(holder, key)) for layer, name, holder, key in self._tensors(state)]

    def replace_states(self, state: Any, change: Callable[[int, str, Tensor], Tensor]) -> Any:
        found = self._tensors(state)
        if state is not None and not found:
            raise ItemError(f"{self.kind} exposes no recurrent state.")
        for layer, name, holder, key in found:
            tensor = _get(holder, key)
            tensor.copy_(change(layer, name, tensor))  # in place: caches may be shared with compiled code
        return state


def _get(holder: Any, key: Any) -> Tensor:
    return getattr(holder, key) if isinstance(key, str) and not isinstance(holder, dict) else holder[key]


def first_words(error: BaseException) -> str:
    """The message in one line, cut where it grows long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= FIRST_WORDS else text[:FIRST_WORDS] + " ..."


def is_ours(folder: Path) -> bool:
    """A run, a checkpoint, or a folder whose config.json is a ModelConfig."""
    if (folder / "checkpoints").is_dir():
        return True
    try:
        return "mixers" in (config := json.loads((folder / "config.json").read_text())) and "model_type" not in config
    except (OSError, ValueError):
        return False


own_coder = coder_of


def hf_coder(folder: str, trusted: bool = False) -> TextCoder | None:
    """The coder of a folder's fast tokenizer, or None; the tokens that start and end a text are those that an import of the folder reads."""
    from tokenizers import Tokenizer

    from data.tokenizer import marks_from

    path = Path(folder) / "tokenizer.json"
    try:
        if path.is_file():
            return coder_of(Tokenizer.from_file(str(path)), folder)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=trusted)
        marks = marks_from(tokenizer.backend_tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id)
        return TextCoder(tokenizer.backend_tokenizer, marks.start_ids, set(tokenizer.all_special_ids), marks.end_ids)
    except Exception:  # tokenizers raises bare Exception, transformers many kinds
        return None


def load_adapter(
    path: str, device: str | torch.device = "cpu", precision: str = "fp32", gguf: str | None = None, trust_remote_code: bool = False
) -> Adapter:
    """The model behind `path`. Raises UserError in one sentence.

    Ours: a run, a checkpoint of it, or model.safetensors with our config.json. Anything else goes to transformers. trust_remote_code: code
    that lies in the folder may be run; without it only code that this version writes itself. gguf: name of a GGUF file in the folder.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(
            f"There is no {folder}; give a run folder, a checkpoint folder, or a folder of a Hugging Face causal language model."
        )
    if is_ours(folder):
        from models.checkpoint import load_model

        model, tokenizer, meta = load_model(folder, device)
        own = OwnAdapter(model, own_coder(tokenizer, meta["folder"]), folder.name or str(folder), meta["folder"], precision)
        own.train_length = (meta.get("run", {}).get("train") or {}).get("seq_len")
        return own
    if not (folder / "config.json").exists() and gguf is None:
        raise UserError(f"{folder} holds no config.json; give a run folder or a folder of a Hugging Face causal language model.")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError("This is no checkpoint of ours, and transformers is not installed: pip install transformers.") from error
    quiet_transformers()
    if gguf is None:
        Weights(folder)  # refuses pickles, and an index that leads out of the folder
    trusted = may_run_code(folder, trust_remote_code)
    try:
        options: dict[str, Any] = {"gguf_file": gguf} if gguf else {"use_safetensors": True}
        hf: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=trusted, **options)
    except Exception as error:
        raise UserError(f"{folder} cannot be loaded by transformers: {first_words(error)}") from error
    foreign = HFAdapter(hf.to(device), hf_coder(str(folder), trusted), folder.name, str(folder), precision)
    foreign.trusted = trusted
    limit = getattr(hf.config, "max_position_embeddings", None)
    foreign.train_length = int(limit) if isinstance(limit, int) else None
    return foreign


def quiet_transformers() -> None:
    """No progress bars and hints about other packages: nothing there is of use to who evaluates."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def total_variation(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Half the L1 distance of the two distributions, (B,), between 0 and 1."""
    return 0.5 * (p_logits.double().softmax(-1) - q_logits.double().softmax(-1)).abs().sum(-1)


def perplexity(nats: float) -> float:
    """exp(nats), kept finite."""
    return math.exp(min(700.0, nats))
