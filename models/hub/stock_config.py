"""What the config.json of a stock folder is as a ModelConfig: it is read by transformers' own classes, so that defaults, old places of a key and
rules between keys are theirs; what our models do not have is refused by name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError
from models.config import ModelConfig
from models.hub.native_delta import DELTA, DELTA_SIZES, OLMO_EPS, too_old
from models.hub.weights import read_object
from models.rope import NEEDED, OPTIONAL

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")  # a config.json that does not say these is not whole
ATTENTION_SIZES = (*SIZES, "intermediate_size", "num_attention_heads")
COUNTS = (
    *ATTENTION_SIZES[:3],
    "num_attention_heads",
    "state_size",
    "head_dim",
    "n_groups",
    "mamba_d_state",
    "mamba_expand",
    "mamba_n_heads",
    "mamba_n_groups",
    *DELTA_SIZES,
)
KINDS = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"), ATTENTION_SIZES),
    "mamba2": (*SIZES, "state_size", "head_dim", "n_groups"),
    "bamba": (*ATTENTION_SIZES, "mamba_d_state", "mamba_expand", "mamba_n_heads", "mamba_n_groups", "mamba_d_conv"),
    "qwen3_5_text": (*ATTENTION_SIZES, "layer_types", *DELTA_SIZES),
    "olmo_hybrid": (*ATTENTION_SIZES, "layer_types", *DELTA_SIZES),
    "everywhen": (*SIZES, "intermediate_size", "rms_norm_eps", "pattern", "mixers", "learnable_residual"),
}
WRONG = (KeyError, AttributeError, ValueError, TypeError, ZeroDivisionError)  # what reading a config whose values make no sense ends in


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers shows no warnings and no bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def their_config(folder: Path) -> Any:
    """The folder's config as an object of transformers' class; no code of the folder is run. Raises UserError."""
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # its classes raise their own kinds
        raise UserError(f"{folder / 'config.json'} is no config that transformers takes: {first_line(error)}") from error


def read_stock_config(folder: Path) -> ModelConfig:
    """The ModelConfig that computes what the stock class of this folder does. Raises UserError."""
    raw = read_object(folder / "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{folder} is a {kind} model; these can be imported: {', '.join(KINDS)}.")
    if raw.get("quantization_config"):
        raise UserError(f"{folder} cannot be imported: its weights are quantised; fetch the original ones.")
    for key in KINDS[kind]:
        if raw.get(key) is None:
            raise UserError(f"{folder / 'config.json'} does not say {key!r}; export or fetch the folder again.")
        if key in COUNTS and (isinstance(raw[key], bool) or not isinstance(raw[key], int) or raw[key] < 1):
            raise UserError(
                f"{folder / 'config.json'} says {key} is {raw[key]!r}, which is no number above zero; export or fetch the folder again."
            )
    if kind in DELTA and (why := too_old(DELTA[kind])):
        raise UserError(f"{folder} cannot be read: {why}; upgrade it.")
    values = None if kind == "everywhen" else their_config(folder)
    try:
        ours = _own(raw) if kind == "everywhen" else READERS.get(kind, _llama)(values, folder)
    except UserError:
        raise
    except WRONG as error:
        raise UserError(f"{folder / 'config.json'} is not a model: {first_line(error)}") from error
    try:
        return ModelConfig.from_dict(ours)
    except WRONG as error:
        raise UserError(f"{folder / 'config.json'} is not a model: {first_line(error)}") from error


def _need(values: Any, folder: Path, required: dict[str, Any]) -> None:
    """Raises UserError for the first key of `required` that is set to a value which our models do not support."""
    for key, only in required.items():
        value, allowed = getattr(values, key, None), only if isinstance(only, tuple) else (only,)
        if value is not None and value not in allowed:
            raise UserError(f"{folder} cannot be imported: its {key} is {value!r}, and only {allowed[0]!r} is supported.")


def _rope(values: Any, folder: Path, partial: bool = False) -> dict[str, Any]:
    """The rotary positions as keys of our attention mixer: rope_theta, rope_fraction and rope_scaling."""
    rope = dict(values.rope_parameters or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{folder} cannot be imported: its rotary positions differ from layer to layer.")
    fraction = float(rope.get("partial_rotary_factor") or 1.0)
    if fraction != 1 and not partial:
        raise UserError(f"{folder} cannot be imported: its rotary positions are partial, which its class does not have.")
    if kind != "default" and kind not in NEEDED:
        raise UserError(
            f"{folder} cannot be imported: its rotary positions are of type {kind}; supported are default, {', '.join(NEEDED)}."
        )
    scaling: dict[str, Any] = {}
    if kind != "default":
        if kind == "dynamic":
            rope["original_max_position_embeddings"] = values.max_position_embeddings
        elif kind == "yarn" and not rope.get("factor"):
            rope["factor"] = values.max_position_embeddings / rope["original_max_position_embeddings"]
        known = [*NEEDED[kind], *OPTIONAL.get(kind, ())]
        scaling = {"rope_type": kind, **{k: rope[k] for k in known if rope.get(k) not in (None, 0)}}
        if "truncate" in known and rope.get("truncate") is False:
            scaling["truncate"] = False
    return {"rope_theta": float(rope.get("rope_theta") or 10000.0), "rope_fraction": fraction, "rope_scaling": scaling or None}


def _heads(values: Any) -> dict[str, Any]:
    heads = values.num_attention_heads
    width = getattr(values, "head_dim", None) or values.hidden_size // heads
    return {"type": "attention", "n_heads": heads, "n_kv_heads": values.num_key_value_heads or heads, "head_dim": width}


def _llama(values: Any, folder: Path) -> dict[str, Any]:
    """Llama, Mistral, Ministral, Qwen2, Qwen3 and SmolLM3: layers of attention and SwiGLU that differ in windows and positions."""
    _need(values, folder, {"hidden_act": ("silu", "swish"), "mlp_bias": False})
    kind, layers, eps = values.model_type, values.num_hidden_layers, float(values.rms_norm_eps)
    biased = bool(getattr(values, "attention_bias", False)) and kind in ("llama", "qwen3", "smollm3")
    mixer = {**_heads(values), **_rope(values, folder), "qk_norm": kind == "qwen3", "qkv_bias": biased or kind == "qwen2", "o_bias": biased}
    if mixer["qk_norm"]:
        mixer["qk_norm_eps"] = eps
    window = getattr(values, "sliding_window", None) or 0
    types = getattr(values, "layer_types", None) if kind not in ("llama", "mistral") else None
    if types is None:
        types = ["sliding_attention" if window and kind == "mistral" else "full_attention"] * layers
    if unknown := sorted(set(types) - {"sliding_attention", "full_attention"}):
        raise UserError(f"{folder} cannot be imported: it has layers of {unknown[0]}, and only full and sliding attention are supported.")
    turned = values.no_rope_layers if kind == "smollm3" else [1] * layers
    names, mixers = [], {}
    for layer_type, rope in zip(types, turned):
        slides = layer_type == "sliding_attention" and window > 0
        name = {(False, True): "attention", (True, True): "swa", (False, False): "nope", (True, False): "swa_nope"}[slides, bool(rope)]
        names.append(name)
        mixers[name] = {**mixer, "window": window if slides else 0, "rope": bool(rope)}
    return {**_common(values, eps), "d_ff": values.intermediate_size, "pattern": _period(names), "mixers": mixers}


def _period(names: list[str]) -> list[str]:
    """The shortest prefix of `names` whose repetition gives all of them."""
    return next(names[:n] for n in range(1, len(names) + 1) if all(name == names[i % n] for i, name in enumerate(names)))


def _limits(values: Any) -> tuple[float, float]:
    low, high = (math.inf if isinstance(v, dict) else float(v) for v in getattr(values, "time_step_limit", None) or (0.0, math.inf))
    return low, 0.0 if math.isinf(high) else high


def _mamba2(values: Any, folder: Path) -> dict[str, Any]:
    _need(values, folder, {"hidden_act": ("silu", "swish"), "use_bias": False, "use_conv_bias": True})
    eps, (low, high) = float(values.layer_norm_epsilon), _limits(values)
    mixer = {
        "type": "mamba2",
        "d_state": values.state_size,
        "expand": values.expand,
        "head_dim": values.head_dim,
        "n_groups": values.n_groups,
        "d_conv": values.conv_kernel,
        "chunk": values.chunk_size,
        "dt_limit_min": low,
        "dt_limit_max": high,
        "norm_eps": eps,
    }
    return {**_common(values, eps), "d_ff": 0, "pattern": ["mamba2"], "mixers": {"mamba2": mixer}}


def _bamba(values: Any, folder: Path) -> dict[str, Any]:
    _need(values, folder, {"hidden_act": ("silu", "swish"), "mlp_bias": False, "mamba_conv_bias": True, "mamba_proj_bias": False})
    if _limits(values) != (0.0, 0.0):
        raise UserError(f"{folder} cannot be imported: its time_step_limit is not that of the class.")
    eps, where, biased = float(values.rms_norm_eps), set(values.attn_layer_indices or []), bool(values.attention_bias)
    attention = {**_heads(values), **_rope(values, folder, partial=True), "qkv_bias": biased, "o_bias": biased}
    mamba = {
        "type": "mamba2",
        "d_state": values.mamba_d_state,
        "expand": values.mamba_expand,
        "head_dim": values.mamba_expand * values.hidden_size // values.mamba_n_heads,
        "n_groups": values.mamba_n_groups,
        "d_conv": values.mamba_d_conv,
        "chunk": values.mamba_chunk_size,
        "norm_eps": eps,
    }
    pattern = ["attention" if i in where else "mamba2" for i in range(values.num_hidden_layers)]
    known = {name: mixer for name, mixer in (("attention", attention), ("mamba2", mamba)) if name in pattern}
    return {**_common(values, eps), "d_ff": values.intermediate_size, "pattern": pattern, "mixers": known}


def _delta(values: Any, folder: Path) -> dict[str, Any]:
    """Qwen3.5 and OLMo Hybrid: Gated DeltaNet beside attention, each with SwiGLU."""
    qwen, eps = values.model_type == "qwen3_5_text", float(values.rms_norm_eps)
    _need(values, folder, {"hidden_act": ("silu", "swish"), **({"attention_bias": False} if qwen else {})})
    if unknown := sorted(set(values.layer_types) - {"linear_attention", "full_attention"}):
        raise UserError(f"{folder} cannot be imported: it has layers of {unknown[0]}, which its class does not have.")
    if len(values.layer_types) != values.num_hidden_layers:
        raise UserError(f"{folder} cannot be imported: it has {len(values.layer_types)} layer_types for {values.num_hidden_layers} layers.")
    turned = (values.rope_parameters or {}).get("rope_theta") is not None
    biased = bool(values.attention_bias)
    attention = {
        **_heads(values), **(_rope(values, folder, partial=qwen) if turned else {}), "rope": turned, "qkv_bias": biased, "o_bias": biased,
        "qk_norm": True, "qk_norm_eps": eps, "qk_norm_over": "head" if qwen else "heads", "qk_norm_centred": qwen, "output_gate": qwen,
    }  # fmt: skip
    delta = {
        "type": "delta",
        "n_heads": values.linear_num_value_heads,
        "n_k_heads": values.linear_num_key_heads,
        "head_dim": values.linear_key_head_dim,
        "expand_v": values.linear_value_head_dim / values.linear_key_head_dim,
        "negative": False if qwen else bool(values.linear_allow_neg_eigval),
        "d_conv": values.linear_conv_kernel_dim,
        "norm_eps": eps if qwen else OLMO_EPS,
    }
    pattern = ["attention" if kind == "full_attention" else "gated_deltanet" for kind in values.layer_types]
    known = {name: mixer for name, mixer in (("attention", attention), ("gated_deltanet", delta)) if name in pattern}
    after = [] if qwen else ["attention"]
    shared = {"d_ff": values.intermediate_size, "pattern": _period(pattern), "mixers": known}
    return {**_common(values, eps), **shared, "centred_norms": qwen, "norm_after": after}


READERS = {"mamba2": _mamba2, "bamba": _bamba, **dict.fromkeys(DELTA, _delta)}


def _own(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": raw["vocab_size"],
        "d_model": raw["hidden_size"],
        "n_layers": raw["num_hidden_layers"],
        "norm_eps": float(raw["rms_norm_eps"]),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "init_std": float(raw.get("initializer_range", 0.02)),
        "d_ff": raw["intermediate_size"],
        "pattern": raw["pattern"][: raw["num_hidden_layers"]],
        "mixers": raw["mixers"],
        "learnable_residual": raw["learnable_residual"],
        "centred_norms": raw.get("centred_norms", False),
        "norm_after": raw.get("norm_after") or [],
        "depth": raw.get("depth") or {},
    }


def _common(values: Any, eps: float) -> dict[str, Any]:
    return {
        "vocab_size": values.vocab_size,
        "d_model": values.hidden_size,
        "n_layers": values.num_hidden_layers,
        "norm_eps": eps,
        "tie_embeddings": bool(values.tie_word_embeddings),
        "init_std": float(values.initializer_range),
    }
