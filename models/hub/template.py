"""The model class of an exported folder; `flatten` puts what it needs of this project's source in front of it.

Legend: B batch, T time, D width, P input projections, R recurrent weights, S states of a cell.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from kernels.parallel_rnn.reference import compute_dtype, parallel, sequential
from kernels.ssd.reference import ssd_chunked
from models.hub.configuration_everywhen import EverywhenConfig
from models.init import tag
from models.layers import RMSNorm, SwiGLU

MIXERS: dict[str, tuple[Any, Any]] = {}  # type: (Config, Mixer)
CELLS: dict[str, Any] = {}  # name: (step, (its Jacobian, its gradients) in torch, its kernel); the last two may be None
triton: Any = None  # the module, in the exported file, if it is installed
SCAN: list[Any] = []  # Mamba-2's scan in kernels, if this file has it
KEEP_FP32: list[str] = []  # parameters that stay fp32 whatever the model's dtype
Pre = Rec = State = Tensor  # what the arguments of a cell's step are: input projection, learned weight, carried state
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # its name in this transformers


class Cell:
    """A recurrent cell: its step function, the names of its arguments by role, its derivatives in torch and its kernel (or None)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.step, self.derivatives, self.kernel = CELLS[name]
        roles = {name: str(p.annotation) for name, p in inspect.signature(self.step).parameters.items()}
        self.pre, self.rec, self.state = ([n for n, role in roles.items() if role == wanted] for wanted in ("Pre", "Rec", "State"))

    def __call__(self, pre: Any, rec: Any, state: Any) -> Any:
        new = self.step(**dict(zip(self.pre, pre)), **dict(zip(self.rec, rec)), **dict(zip(self.state, state)))
        return tuple(n if n.dim() >= state[0].dim() else n.expand_as(state[0]) for n in new)


@functools.cache
def load_cell(name: str) -> Cell:
    return Cell(name)


def torch_functions(cell: Cell) -> Any:
    return cell.derivatives


def parallel_rnn(
    cell: Any, pre: Tensor, rec_RD: Tensor, h0_BSD: Tensor | None, starts_BT: Tensor | None, *, bias_PD: Tensor | None = None, emitted: bool = False
) -> tuple[Tensor, Tensor]:
    """All states (B, T, S, D), with `emitted` only the last one's (B, T, D), and the final states (B, S, D); a document start zeroes the state
    first. pre (B, T, P, D) or (B, T, P, heads, D / heads). Without gradients and on a GPU by the cell's kernel; else in plain torch, over
    many slices of time at once."""
    pre_BTPD = pre.flatten(3)
    if bias_PD is not None:
        pre_BTPD = pre_BTPD + bias_PD.to(pre_BTPD.dtype)
    (B, T, _, D), dtype = pre_BTPD.shape, compute_dtype(pre_BTPD)
    h0 = (torch.zeros(B, len(cell.state), D, device=pre.device) if h0_BSD is None else h0_BSD).to(dtype)
    learning = torch.is_grad_enabled() and (pre.requires_grad or rec_RD.requires_grad or h0.requires_grad)
    if has_kernel(cell, pre_BTPD) and T and not learning:
        states, final = walk_on_gpu(cell, pre_BTPD, rec_RD, h0, starts_BT)
    else:
        run = sequential if T == 1 or cell.derivatives is None else parallel  # without written derivatives by the loop alone
        with torch.autocast(pre.device.type, enabled=False):
            states, final = run(cell, pre_BTPD.to(dtype), rec_RD.to(dtype), h0, starts_BT)
        states = states.to(pre.dtype)
    return states[:, :, -1] if emitted else states, final


def parallel_rnn_step(cell: Any, pre_BPD: Tensor, rec_RD: Tensor, h_BSD: Tensor, bias_PD: Tensor | None = None) -> Tensor:
    """The states (B, S, D) after one token."""
    return parallel_rnn(cell, pre_BPD[:, None], rec_RD, h_BSD, None, bias_PD=bias_PD)[1].to(h_BSD.dtype)


def has_kernel(cell: Any, pre: Tensor) -> bool:
    """Whether the cell's Triton kernel can run."""
    placed = pre.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return placed and triton is not None and cell.kernel is not None and pre.dtype != torch.float64


def walk_on_gpu(cell: Any, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(states, final) by the cell's kernel."""
    pre = pre if pre.stride(-1) == 1 else pre.contiguous()
    (B, T, _, D), S = pre.shape, len(cell.state)
    rec, h0 = rec.detach().float().contiguous(), h0.float().contiguous()
    states, final = pre.new_empty(B, T, S, D), torch.empty_like(h0)
    flags = states if starts is None else starts.contiguous().view(torch.uint8)
    with torch.cuda.device_of(pre):  # Triton launches on the current device
        cell.kernel[(-(-D // 64), B)](
            pre, rec, h0, flags, states, final, T, D, *pre.stride()[:3], HAS_STARTS=starts is not None, BLOCK=64, num_warps=1
        )
    return states, final


def ssd(x: Tensor, dt: Tensor, A: Tensor, B_: Tensor, C_: Tensor, h0: Tensor | None, starts: Tensor | None, *, chunk: int, D_H: Tensor) -> Any:
    """Mamba-2's scan and skip: without gradients and on a GPU in kernels, else in plain torch in chunks of time."""
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dt, A, B_, C_, D_H, h0))
    if SCAN and not learning and x.shape[1] and can_scan(x):
        try:
            with torch.cuda.device_of(x):
                return SCAN[0](x, dt, A, B_, C_, D_H, h0, starts)
        except triton.OutOfResources:  # less shared memory than the kernels were made for
            SCAN.clear()
    return ssd_chunked(x, dt, A, B_, C_, h0, starts, chunk, D_H)


def can_scan(x: Tensor) -> bool:
    """Whether the scan's kernels can run: those of a GPU with products of bfloat16."""
    if triton is None or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    suits = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return suits or os.environ.get("TRITON_INTERPRET") == "1"


def each(change: Any, value: Any) -> Any:
    """`value` with `change` applied to every tensor in it (lists, dataclasses)."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [each(change, v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]  # others are made again when they are missed
        return dataclasses.replace(value, **{name: each(change, getattr(value, name)) for name in fields})
    return value


class EverywhenCache(Cache):
    """The states of all layers after the tokens seen. To take tokens back, which a recurrent state cannot, the states at an earlier place
    are kept with the tokens since, and those are read again."""

    is_compileable = False
    is_croppable = True
    is_initialized = True
    is_linear = [False]
    is_sliding = [False]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        self.states: Any = None
        self.seen = 0
        self.anchor: Any = None
        self.anchor_seen = 0
        self.since: list[Any] = []  # [ids or None, segments] of each call since the anchor
        self.pending: Any = None  # [ids, segments] to be read before anything else

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    @property
    def batch_size(self) -> int:
        return 0 if not self.since else int(self.since[0][1].shape[0])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """The past is always recorded."""

    def crop(self, tokens: int) -> None:
        """Takes back -tokens tokens; a positive number says how many stay."""
        target = self.seen + tokens if tokens <= 0 else min(tokens, self.seen)
        if target == self.seen:
            return
        if target < self.anchor_seen or any(piece[0] is None for piece in self.since):
            raise ValueError("These tokens can no longer be taken back from the cache.")
        ids, segments = (torch.cat(parts, 1)[:, : target - self.anchor_seen] for parts in zip(*self.since))
        self.states, self.seen, self.since = self.anchor, target, []
        self.pending = [ids, segments] if ids.shape[1] else None

    def _change(self, change: Any) -> None:
        self.states, self.anchor, self.since, self.pending = (each(change, v) for v in (self.states, self.anchor, self.since, self.pending))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda t: t[indices])


class Block(nn.Module):
    """x <- s x + mixer(norm(x)), then x <- s' x + mlp(norm(x)); s are learned scales or 1."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        settings = dict(config.mixers[config.pattern[layer % len(config.pattern)]])
        Settings, Mixer = MIXERS[settings.pop("type")]
        self.mixer_norm = RMSNorm(D, config.rms_norm_eps)
        self.mixer = Mixer(Settings(**settings), D, layer)
        self.mlp_norm = RMSNorm(D, config.rms_norm_eps) if width else None
        self.mlp = SwiGLU(D, width) if width else None
        self.residual_scale = tag(nn.Parameter(torch.empty(1 + bool(width), D)), "no_decay") if config.learnable_residual else None

    def forward(self, x_BTD: Tensor, state: Any, segment_ids: Tensor | None) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.mixer_norm(x_BTD), state, segment_ids)
        x_BTD = self._keep(x_BTD, 0) + y
        if self.mlp is not None and self.mlp_norm is not None:
            x_BTD = self._keep(x_BTD, 1) + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD, state

    def _keep(self, x_BTD: Tensor, which: int) -> Tensor:
        return x_BTD if self.residual_scale is None else x_BTD * self.residual_scale[which].to(x_BTD.dtype)


class EverywhenPreTrainedModel(PreTrainedModel):
    config_class = EverywhenConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = KEEP_FP32


class EverywhenModel(EverywhenPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """attention_mask (B, L): zeros on the left are padding, which the text never sees."""
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = EverywhenCache()
        segments = self._segments(attention_mask, x_BTD, cache)
        if cache is None:
            x_BTD, _ = self._run(x_BTD, None, segments)
        else:
            if cache.states is None:
                cache.states = cache.anchor = [b.mixer.init_state(x_BTD.shape[0], x_BTD.device, x_BTD.dtype) for b in self.layers]
            if cache.pending is not None:
                ids, before = cache.pending
                _, cache.states = self._run(self.embed_tokens(ids), cache.states, before)
                cache.anchor, cache.anchor_seen, cache.pending = cache.states, cache.seen, None
            known = torch.zeros(x_BTD.shape[:2], dtype=torch.int32, device=x_BTD.device) if segments is None else segments
            cache.since.append([input_ids, known])
            x_BTD, cache.states = self._run(x_BTD, cache.states, segments)
            cache.seen += x_BTD.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD), **{CACHE: cache})

    def _run(self, x_BTD: Tensor, states: Any, segments: Tensor | None) -> tuple[Tensor, list[Any]]:
        after = []
        for i, block in enumerate(self.layers):
            x_BTD, state = block(x_BTD, None if states is None else states[i], segments)
            after.append(state)
        return x_BTD, after

    @staticmethod
    def _segments(mask: Tensor | None, x_BTD: Tensor, cache: Any) -> Tensor | None:
        """Text is segment 0 and padding segment 1; None where all is text. One decoded token is text."""
        T = x_BTD.shape[1]
        if mask is None or mask.ndim != 2 or (T == 1 and cache is not None and cache.seen) or bool(mask[:, -T:].all()):
            return None
        segments = (mask[:, -T:] == 0).to(torch.int32)
        if cache is not None and bool(segments[:, -1].any()):
            raise ValueError("Padding must be on the left of the text: set tokenizer.padding_side = 'left'.")
        return segments


class EverywhenForCausalLM(EverywhenPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = EverywhenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> None:
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = EverywhenCache()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        cache = past_key_values if cache is None else cache
        output: Any = self.model(input_ids, attention_mask, cache, inputs_embeds=inputs_embeds, use_cache=use_cache)
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: output[CACHE] if CACHE in output else None})
