"""The model classes of an exported folder; `flatten` puts what they need of this project's source in front of them. They do all that
transformers' Trainer, generate and save/load ask of a stock class (docs/hub.md lists it).

Legend: B batch, T time, D width, L cached and new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from models.hub.configuration_everywhen import EverywhenConfig
from models.hub.template_cache import EverywhenCache
from models.init import init_matrix, roles, tag
from models.layers import RMSNorm, SwiGLU
from models.segments import Documents

MIXERS: dict[str, tuple[Any, Any]] = {}  # type: (Config, Mixer)
WAYS: dict[str, tuple[Any, Any]] = {}  # type: (Config, Way) of what leads tokens otherwise than once through each layer
logger = logging.get_logger(__name__)
KEEP_FP32: list[str] = []  # parameters that stay fp32 whatever the model's dtype
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # its name in this transformers


class Block(GradientCheckpointingLayer):
    """x <- s x + mixer(norm(x)), then x <- s' x + mlp(norm(x)), or the norms behind mixer and mlp; s are learned scales or 1."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        name, centred = config.pattern[layer % len(config.pattern)], config.centred_norms
        settings = dict(config.mixers[name])
        Settings, Mixer = MIXERS[settings.pop("type")]
        self.norm_after = name in (config.norm_after or ())
        self.mixer_norm = RMSNorm(D, config.rms_norm_eps, centred=centred)
        self.mixer = Mixer(Settings(**settings), D, layer)
        self.mlp_norm = RMSNorm(D, config.rms_norm_eps, centred=centred) if width else None
        self.mlp = SwiGLU(D, width) if width else None
        self.residual_scale = tag(nn.Parameter(torch.empty(1 + bool(width), D)), "no_decay") if config.learnable_residual else None

    def forward(self, x_BTD: Tensor, state: Any, segment_ids: Tensor | None, documents: Documents | None) -> tuple[Tensor, Any]:
        more = {"documents": documents} if self.mixer.takes_documents else {}
        y, state = self.mixer(x_BTD if self.norm_after else self.mixer_norm(x_BTD), state, segment_ids, **more)
        x_BTD = self._keep(x_BTD, 0) + (self.mixer_norm(y) if self.norm_after else y)
        if self.mlp is not None and self.mlp_norm is not None:
            y = self.mlp_norm(self.mlp(x_BTD)) if self.norm_after else self.mlp(self.mlp_norm(x_BTD))
            x_BTD = self._keep(x_BTD, 1) + y
        return x_BTD, state

    def _keep(self, x_BTD: Tensor, which: int) -> Tensor:
        return x_BTD if self.residual_scale is None else x_BTD * self.residual_scale[which].to(x_BTD.dtype)

    def init_weights(self, std: float, n_layers: int) -> None:
        if self.residual_scale is not None:
            nn.init.ones_(self.residual_scale)


class Walk:
    """Tokens on their way through layers: each visit takes its state from `states` and leaves the next one in `after`; `every`: x after each."""

    def __init__(self, x_BTD: Tensor, states: Any, segment_ids: Tensor | None, documents: Documents | None) -> None:
        self.x, self.states, self.segment_ids, self.documents = x_BTD, states, segment_ids, documents
        self.after: list[Any] = []
        self.every = [x_BTD]
        self.token_loss_BT: Tensor | None = None

    def through(self, block: Any) -> None:
        """One visit."""
        before = None if self.states is None else self.states[len(self.after)]
        self.x, after = block(self.x, before, self.segment_ids, self.documents)
        self.after.append(after)
        self.every.append(self.x)


class EverywhenPreTrainedModel(PreTrainedModel):
    config_class = EverywhenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = KEEP_FP32

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Draws what a file did not hold, as in pretraining: what writes into the residual stream starts smaller with depth."""
        if isinstance(module, PreTrainedModel):  # its parts are drawn each for itself
            return
        loaded = [(p, p.detach().clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        super()._init_weights(module)
        std, depth = self.config.initializer_range, self.config.num_hidden_layers
        if isinstance(module, nn.Linear) and roles(module.weight).get("residual"):
            init_matrix(module.weight, std, depth)
        elif hasattr(module, "init_weights"):
            sized = "std" in module.init_weights.__code__.co_varnames
            module.init_weights(*((std, depth) if sized else ()))
        for parameter, value in loaded:
            parameter.copy_(value)


def padding(mask_BL: Any, T: int, seen: int) -> Tensor | None:
    """(B, T) the last T columns of the mask, 1 for text, or None where the T tokens are all text. Raises ValueError for a mask that cannot be followed."""
    if mask_BL is None or not T or (T == 1 and seen):  # one decoded token is text
        return None
    if not isinstance(mask_BL, Tensor) or mask_BL.ndim != 2 or mask_BL.shape[1] < T:
        raise ValueError(
            "attention_mask must have a row for each sequence and a column for each token (1 text, 0 padding); other masks have no meaning for a recurrence."
        )
    text = (mask_BL != 0).to(torch.int32)
    now, before = text[:, -T:], text[:, :-T]
    if seen and bool((before.any(1) & ~now.all(1)).any()):
        raise ValueError("There can be no padding after text that is in the cache; give each row as many new tokens.")
    restarts = seen and before.shape[1] and not bool(before[:, -1].all())
    return now if restarts or not bool(now.all()) else None


def packed(position_ids: Any, T: int) -> Tensor | None:
    """(B, T) the number of each token's text where positions start again within rows, as data collators pack texts; None where they do not."""
    if position_ids is None or T == 1:
        return None
    jumps = (position_ids[:, 1:] - position_ids[:, :-1]) != 1
    if not bool(jumps.any()):
        return None
    return nn.functional.pad(jumps.cumsum(1, dtype=torch.int32), (1, 0))


def taken(x: Tensor, order_BT: Tensor) -> Tensor:
    """The columns of (B, T) or (B, T, D) in the order of each row."""
    return x.gather(1, order_BT if x.ndim == 2 else order_BT[..., None].expand(-1, -1, x.shape[-1]))


class EverywhenModel(EverywhenPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, centred=config.centred_norms)
        way, self.depth = dict(config.depth or {}), None
        if way:
            Settings, Way = WAYS[way.pop("type")]
            self.depth = Way(Settings(**way), config.hidden_size, config.num_hidden_layers)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """attention_mask (B, L): zeros are padding, which the text never sees, wherever it lies. position_ids (B, T): where they start again,
        a new text does; otherwise they are ignored, as a recurrence has no positions."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            logger.warning_once("This model has no attention maps to return; output_attentions changes nothing.")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        text = padding(attention_mask, x_BTD.shape[1], 0 if cache is None else cache.seen)
        segments = None if text is None else 1 - text
        back = None
        if text is not None and bool((text[:, 1:] < text[:, :-1]).any()):  # padding within or behind the text: it is laid in front
            order = text.argsort(dim=1, stable=True)
            # Padding behind the text: generate asks there for the next token, so it gets the output of the text's last token.
            behind = text.flip(1).cumsum(1).flip(1) == 0
            back = order.argsort(dim=1).masked_fill(behind, text.shape[1] - 1)
            x_BTD, segments = taken(x_BTD, order), taken(1 - text, order)
            input_ids = None if input_ids is None else taken(input_ids, order)
        elif attention_mask is None and (cache is None or not cache.seen):
            segments = packed(position_ids, x_BTD.shape[1])
            segments = None if segments is None else segments.expand(x_BTD.shape[:2])
        x_BTD, every = self._read(x_BTD, input_ids, segments, cache)
        every = [self.norm(x_BTD) if i == len(every) - 1 else x for i, x in enumerate(every)]
        if back is not None:
            every = [taken(x, back) for x in every]
        output = BaseModelOutputWithPast(
            last_hidden_state=every[-1], hidden_states=self._chosen(every, output_hidden_states), **{CACHE: cache}
        )
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _cache(self, cache: Any, use_cache: bool | None) -> Any:
        """The cache of this call, or None."""
        if cache is not None and not isinstance(cache, EverywhenCache):
            raise ValueError(
                f"The cache of this model is an {EverywhenCache.__name__}, not a {type(cache).__name__}; give none, and the output has the right one."
            )
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return None
        make_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        return EverywhenCache() if cache is None and make_cache else cache

    def _read(self, x_BTD: Tensor, input_ids: Tensor | None, segments: Tensor | None, cache: Any) -> tuple[Tensor, list[Tensor]]:
        """(the last layer's output, the list of x and every layer's output); the cache is moved on by these tokens."""
        if cache is None:
            return self._run(x_BTD, None, segments)[::2]
        if cache.states is None:
            visits = self.layers if self.depth is None else [self.layers[i] for i in self.depth.visits()]
            cache.states = cache.anchor = [b.mixer.init_state(x_BTD.shape[0], x_BTD.device, x_BTD.dtype) for b in visits]
        if cache.pending is not None:
            ids, before = cache.pending
            _, cache.states, _ = self._run(self.embed_tokens(ids), cache.states, before)
            cache.anchor, cache.anchor_seen, cache.pending = cache.states, cache.seen, None
        known = torch.zeros(x_BTD.shape[:2], dtype=torch.int32, device=x_BTD.device) if segments is None else segments
        cache.since.append([input_ids, known])
        y_BTD, cache.states, every = self._run(x_BTD, cache.states, segments)
        cache.seen += x_BTD.shape[1]
        return y_BTD, every

    def _run(self, x_BTD: Tensor, states: Any, segments: Tensor | None) -> tuple[Tensor, list[Any], list[Tensor]]:
        if not x_BTD.shape[1]:  # no tokens: nothing changes
            return x_BTD, states, [x_BTD] * (1 + len(self.layers if self.depth is None else self.depth.visits()))
        walk = Walk(x_BTD, states, segments, None if segments is None or states is not None else Documents(segments))
        if self.depth is not None:
            self.depth(self.layers, walk)
            walk.every[-1] = walk.x
        else:
            for block in self.layers:
                walk.through(block)
        return walk.x, walk.after, walk.every

    def _chosen(self, every: list[Tensor], which: Any) -> Any:
        """The hidden states that are asked for: all (True), or those of these indices."""
        which = getattr(self.config, "output_hidden_states", False) if which is None else which
        if isinstance(which, bool) or which is None:
            return tuple(every) if which else None
        indices = {i % len(every) for i in ([which] if isinstance(which, int) else which) if -len(every) <= i < len(every)}
        return tuple(x if i in indices else None for i, x in enumerate(every))


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
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: Any = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """labels (B, T): those of the same tokens, -100 where there is none; num_items_in_batch divides the sum of losses if it is given."""
        output: Any = self.model(
            input_ids, attention_mask, position_ids, past_key_values if cache is None else cache, inputs_embeds=inputs_embeds,
            use_cache=use_cache, output_hidden_states=output_hidden_states, return_dict=True, **kwargs,
        )  # fmt: skip
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        past = {CACHE: output[CACHE] if CACHE in output else None}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=output.hidden_states, **past)
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()
