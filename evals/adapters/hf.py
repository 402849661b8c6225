"""A Hugging Face causal language model behind the interface of evals/adapters/base.py. Legend as there.

How such a model carries its state is not believed but tried: on loading, a short random sequence is fed whole and in pieces, and the way of
feeding that gives the same logits is used ("chunks", else "steps" of one token, else "none": whole sequences only).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.tokenizer import TextCoder, coder_of
from evals.adapters.base import Adapter, ItemError, LayerState, as_heads, first_words, recurrent_fields
from training.errors import UserError

# What outputs call the cache, and with it the argument that takes it back; the newest name first, as older ones live on as aliases of outputs only.
CACHES = ("cache", "past_key_values", "cache_params", "state")


class HFAdapter(Adapter):
    """A transformers causal language model: backbone and head are called apart, where that gives the model's own logits."""

    def __init__(self, model: Any, coder: TextCoder | None, name: str, folder: str, precision: str = "fp32") -> None:
        self.model, self.coder, self.name, self.folder, self.precision = model.eval(), coder, name, folder, precision
        self.kind = f"transformers {type(model).__name__}"
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.device = next(model.parameters()).device
        self.position_limit = self._hard_limit()
        self.whole_beyond = self._stretches_beyond()
        self.split_head = self._head_apart()
        self.carry = self._how_to_carry()

    def _hard_limit(self) -> int | None:
        """Tokens that a table of learned positions allows, None where there is no such table."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or getattr(self.model.config, "n_positions", None)
        model: Any = self.model
        words = model.get_input_embeddings()
        tables = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not words and limit]
        return int(limit) if limit and any(limit <= m.num_embeddings <= limit + 2 for m in tables) else None  # OPT's has two places more

    def _stretches_beyond(self) -> int | None:
        """Tokens beyond which rotary frequencies follow the length of each call (dynamic and longrope), so that a text in pieces is another one."""
        lengths = []
        for m in self.model.modules():
            kind = getattr(m, "rope_type", "")
            kinds = list(kind.values()) if isinstance(kind, dict) else [kind]  # of models with several kinds of layers
            if any("dynamic" in str(k) or k == "longrope" for k in kinds):
                config: Any = m.config
                scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
                several = [scaling, *(part for part in scaling.values() if isinstance(part, dict))]
                lengths += [n for part in several if (n := part.get("original_max_position_embeddings"))]
                lengths.append(config.max_position_embeddings)
        return min(map(int, lengths), default=None)

    @property
    def _backbone(self) -> Any:
        model: Any = self.model
        return getattr(model, getattr(model, "base_model_prefix", "") or "model", None)

    def _probe_ids(self, T: int) -> Tensor:
        """(2, T) ids, the same at each call; two rows, as there are caches that are right of one alone (RWKV's, token by token)."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(min(self.vocab_size, 1000), (2, T), generator=generator).to(self.device)

    @torch.no_grad()
    def _head_apart(self) -> bool:
        """Whether backbone and head, called one after the other, give the model's own logits; then those of a piece can be made alone."""
        model, backbone = self.model, self._backbone
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if backbone is None or backbone is model or head is None:
            return False
        ids = self._probe_ids(7)
        try:
            logits, hidden = model(input_ids=ids).logits.float(), backbone(input_ids=ids)[0]
            apart = (head(hidden.to(head.weight.dtype)).float() - logits).abs().max()
            return bool(apart <= 1e-5 * logits.abs().max())  # a soft cap of logits changes small ones by little
        except Exception:
            return False

    @torch.no_grad()
    def _how_to_carry(self) -> str:
        """The first of "chunks" and "steps" whose logits are those of the whole sequence, else "none". Raises UserError where nothing runs."""
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
                state, parts = self._start(len(ids)), []
                for a, b in zip(cuts, cuts[1:]):
                    hidden, state = self._hidden(ids[:, a:b], state)
                    parts.append(self._head(hidden).float())
                if float((torch.cat(parts, 1) - whole).abs().max()) <= scale:
                    return way
            except Exception:
                continue
        return "none"

    def _start(self, batch: int) -> Any:
        """None: a model makes its cache on the first call. From then on the state is (name of the argument, cache). Frequencies that stretch keep the
        longest call's until a short one comes, so that one goes before every text."""
        if self.whole_beyond is not None:
            with torch.no_grad():
                self.model(input_ids=self._probe_ids(1), use_cache=False)
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
        """(layer, name, holder, key) of each recurrent tensor in a cache; `_get(holder, key)` is the tensor.

        Looked for in transformers' linear-attention layers, in dataclasses of mixers, and in attributes that hold one tensor a layer (older
        caches, e.g. `ssm_states`).
        """
        if state is None:
            return []
        cache: Any = state[1]
        places: list[tuple[int, str, Any, Any]] = []
        parts = getattr(cache, "layers", None)
        for layer, part in enumerate(parts if isinstance(parts, (list, tuple)) else []):
            recurrent = getattr(part, "recurrent_states", None)
            if isinstance(recurrent, dict):
                places += [(layer, "recurrent", recurrent, key) for key, value in recurrent.items() if isinstance(value, Tensor)]
            elif isinstance(recurrent, Tensor):
                places.append((layer, "recurrent", part, "recurrent_states"))
            else:
                places += [(layer, name.split("_")[0], part, name) for name in recurrent_fields(part)]
        for name in ("ssm_states", "recurrent_states"):
            by_layer = getattr(cache, name, None)
            if isinstance(by_layer, Tensor):
                places += [(layer, name, by_layer, layer) for layer in range(by_layer.shape[0])]
            elif isinstance(by_layer, (list, dict)):
                keys: list[Any] = list(range(len(by_layer))) if isinstance(by_layer, list) else list(by_layer)
                places += [(int(key), name, by_layer, key) for key in keys if isinstance(by_layer[key], Tensor)]
        return places

    def layer_states(self, state: Any) -> list[LayerState]:
        return [as_heads(layer, name, _get(holder, key)) for layer, name, holder, key in self._tensors(state)]

    def replace_states(self, state: Any, change: Callable[[int, str, Tensor], Tensor]) -> Any:
        places = self._tensors(state)
        if state is not None and not places:
            raise ItemError(f"{self.kind} exposes no recurrent state.")
        for layer, name, holder, key in places:
            tensor = _get(holder, key)
            tensor.copy_(change(layer, name, tensor))  # in place: caches may be shared with compiled code
        return state


def _get(holder: Any, key: Any) -> Tensor:
    return getattr(holder, key) if isinstance(key, str) and not isinstance(holder, dict) else holder[key]


def hf_coder(folder: str, trusted: bool = False) -> TextCoder | None:
    """The coder of a folder's fast tokenizer, None where it cannot be read; the tokens that start and end a text are those that an import of the
    folder reads. trusted: whether the tokenizer may be code of the folder."""
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
