"""Models of the delta rule as stock classes of transformers: Qwen3.5 (text) and OLMo Hybrid, both Gated DeltaNet beside softmax attention.

Qwen3.5 has norms whose weights are gains above 1, an output gate on its attention and queries and keys normalised head by head. OLMo Hybrid has
ordinary norms, those of its attention blocks behind their sublayers, queries and keys normalised over all heads, and strengths up to 2 if wanted.
Both keep the projections that are one matrix here in several; `Stock.cuts` says which rows lie where.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from models import mixers
from models.config import ModelConfig
from models.hub.stock import Cut, Stock, positions, rope_parameters

RELEASE = (5, 24)  # of transformers, whose Qwen3_5ForCausalLM and OlmoHybridForCausalLM these are
DELTA = {"qwen3_5_text": "Qwen3_5ForCausalLM", "olmo_hybrid": "OlmoHybridForCausalLM"}  # class by model_type
OLMO_EPS = 1e-5  # of the norm inside OLMo Hybrid's delta rule, whatever its config says
DELTA_SIZES = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim")
MLP = [
    (r"embedding\.weight", "model.embed_tokens.weight"),
    (r"norm\.weight", "model.norm.weight"),
    (r"head\.weight", "lm_head.weight"),
    (r"blocks\.(\d+)\.mlp\.(gate|up|down)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
    (r"blocks\.(\d+)\.mixer\.(A_log|dt_bias)", r"model.layers.\1.linear_attn.\2"),
    (r"blocks\.(\d+)\.mixer\.([qkvo]_proj|[qk]_norm)\.(weight|bias)", r"model.layers.\1.self_attn.\2.\3"),
]
QWEN_RULES = [
    *MLP,
    (r"blocks\.(\d+)\.mixer_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blocks\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blocks\.(\d+)\.mixer\.conv\.weight", r"model.layers.\1.linear_attn.conv1d.weight"),
    (r"blocks\.(\d+)\.mixer\.(norm|out_proj)\.weight", r"model.layers.\1.linear_attn.\2.weight"),
]


def too_old(architecture: str) -> str:
    """Why the installed transformers cannot have this class as it is meant here, or ''."""
    installed = version("transformers")
    if tuple(int(part) for part in installed.split(".")[:2]) >= RELEASE:
        return ""
    return f"{architecture} needs transformers {'.'.join(map(str, RELEASE))} or later, and {installed} is installed"


def stock_delta(config: ModelConfig, max_positions: int) -> tuple[Stock | None, str]:
    """(the class that this model of delta rules, or of gated attention, is; why it is none)."""
    names = [config.mixer_name(layer) for layer in range(config.n_layers)]
    kinds: dict[str, list[Any]] = {"delta": [], "attention": []}
    for name in dict.fromkeys(names):
        mixer, problems = mixers.parse(name, config.mixers[name], config.d_model)
        assert mixer is not None, problems
        known = kinds.setdefault(str(config.mixers[name]["type"]), [])
        if mixer not in known:
            known.append(mixer)
    if len(kinds) > 2 or any(len(known) > 1 for known in kinds.values()):
        return None, "its layers have different mixers, and not one kind of delta rule and one of attention"
    delta, attention = (known[0] if known else None for known in (kinds["delta"], kinds["attention"]))
    wants = [
        ("it has no MLP", not config.mlp_width),
        ("it updates its state several times a token", delta is not None and delta.updates > 1),
        ("its delta rule has no gate", delta is not None and not (delta.gate and delta.output_gate)),
        ("it has no layer of attention, without which no stock class of the delta rule can count its tokens", attention is None),
        ("its attention has a window", attention is not None and attention.window),
        ("its attention does not normalise queries and keys", attention is not None and not attention.qk_norm),
        (
            "its norms have several epsilons",
            attention is not None and attention.qk_norm_eps != config.norm_eps,
        ),
    ]
    if reason := next((reason for reason, so in wants if so), ""):
        return None, reason
    assert attention is not None
    after = {name for name in names if name in config.norm_after}
    types = {name: str(config.mixers[name]["type"]) for name in names}
    if after or not (attention.output_gate or config.centred_norms):
        behind = after == {name for name in names if types[name] == "attention"}
        reason, architecture = _why_not_olmo(config, delta, attention, behind), "OlmoHybridForCausalLM"
    else:
        reason, architecture = _why_not_qwen(config, delta, attention), "Qwen3_5ForCausalLM"
    if reason := reason or too_old(architecture):
        return None, reason
    layers = ["full_attention" if types[name] == "attention" else "linear_attention" for name in names]
    return (_qwen if architecture.startswith("Qwen") else _olmo)(config, delta, attention, layers, max_positions), ""


def _first(wants: list[tuple[str, bool]]) -> str:
    return next((reason for reason, so in wants if so), "")


def _why_not_qwen(config: ModelConfig, delta: Any, attention: Any) -> str:
    return _first([
        ("its norms do not hold what their gains are above 1 (centred_norms)", not config.centred_norms),
        ("those of its queries and keys do not (qk_norm_centred)", not attention.qk_norm_centred),
        ("its queries and keys are normalised over all heads", attention.qk_norm_over != "head"),
        ("its attention has no output gate", not attention.output_gate),
        ("its attention has biases", attention.qkv_bias or attention.o_bias),
        ("its attention has no rotary positions", not attention.rope),
        ("its delta rule has strengths to 2", delta is not None and delta.negative),
        ("the norm inside its delta rule has another epsilon than its other norms", delta is not None and delta.norm_eps != config.norm_eps),
    ])  # fmt: skip


def _why_not_olmo(config: ModelConfig, delta: Any, attention: Any, behind: bool) -> str:
    return _first([
        ("its norms hold what their gains are above 1", config.centred_norms or attention.qk_norm_centred),
        ("it has no layer of the delta rule", delta is None),
        ("its norms do not lie behind the sublayers of its attention blocks, and of these alone (norm_after)", not behind),
        ("its queries and keys are normalised head by head (qk_norm_over)", attention.qk_norm_over != "heads"),
        ("its attention has an output gate", attention.output_gate),
        ("its attention has biases in some projections only", attention.qkv_bias != attention.o_bias),
        ("its rotary positions are on a part of the heads", attention.rope and attention.rope_fraction != 1),
        ("its attention heads are not d_model / n_heads wide", attention.head_dim not in (0, config.d_model / attention.n_heads)),
        (f"the norm inside its delta rule has an epsilon other than {OLMO_EPS:g}", delta is not None and delta.norm_eps != OLMO_EPS),
    ])  # fmt: skip


def _shared(config: ModelConfig, delta: Any, attention: Any, layers: list[str], max_positions: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
        "attention_bias": attention.o_bias,
        "layer_types": layers,
        "hidden_act": "silu",
        "max_position_embeddings": positions(attention, max_positions),
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    if delta is None:  # the sizes of no layer; those of the class
        return {**values, **dict(zip(DELTA_SIZES, (16, 32, 128, 128, 4)))}
    width = delta.head_dim or config.d_model // delta.n_heads
    sizes = delta.n_k_heads or delta.n_heads, delta.n_heads, width, round(delta.expand_v * width), delta.d_conv
    return {**values, **dict(zip(DELTA_SIZES, sizes))}


def _qwen(config: ModelConfig, delta: Any, attention: Any, layers: list[str], max_positions: int) -> Stock:
    values = {
        "model_type": "qwen3_5_text",
        "architectures": ["Qwen3_5ForCausalLM"],
        **_shared(config, delta, attention, layers, max_positions),
        "head_dim": attention.head_dim or config.d_model // attention.n_heads,
        "rope_parameters": {**rope_parameters(attention), "partial_rotary_factor": attention.rope_fraction},
    }
    return Stock("Qwen3_5ForCausalLM", values, QWEN_RULES, qwen_cuts(values))


def qwen_cuts(values: dict[str, Any]) -> list[Cut]:
    """Where rows of our matrices lie in Qwen3.5's of this config: the output gate of attention lies with the queries, head by head."""
    heads, width, out = values["num_attention_heads"], values["head_dim"], r"model.layers.\1.self_attn.q_proj.weight"
    cuts: list[Cut] = [
        (rf"blocks\.(\d+)\.mixer\.{kind}_proj\.weight", [(out, (2 * h + i) * width, h * width, width) for h in range(heads)])
        for i, kind in enumerate("qg")
    ]
    if "linear_attention" in values["layer_types"]:
        keys, all_values = _widths(values)
        each = {"z": all_values, "qkv": 2 * keys + all_values, **dict.fromkeys("ba", values["linear_num_value_heads"])}
        cuts.append((r"blocks\.(\d+)\.mixer\.in_proj\.weight", _behind(r"model.layers.\1.linear_attn.in_proj_{}.weight", each)))
    return cuts


def _olmo(config: ModelConfig, delta: Any, attention: Any, layers: list[str], max_positions: int) -> Stock:
    values = {
        "model_type": "olmo_hybrid",
        "architectures": ["OlmoHybridForCausalLM"],
        **_shared(config, delta, attention, layers, max_positions),
        "rope_parameters": rope_parameters(attention) if attention.rope else {"rope_type": "default", "rope_theta": None},
        "linear_dt_min": delta.dt_min,
        "linear_dt_max": delta.dt_max,
        "linear_dt_init_floor": delta.dt_floor,
        "linear_allow_neg_eigval": delta.negative,
    }
    return Stock("OlmoHybridForCausalLM", values, olmo_rules(values), olmo_cuts(values), OLMO_ALIASES)


OLMO_ALIASES = {  # both are read: files say the first, which transformers writes, or the second, its parameters' own names
    "attention_layer_norm": "input_layernorm",
    "feedforward_layer_norm": "post_attention_layernorm",
}


def olmo_rules(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Our names in OLMo Hybrid's files. The norm behind an attention has the name that the one before an MLP has elsewhere."""
    softmax = "|".join(str(i) for i, kind in enumerate(values["layer_types"]) if kind == "full_attention") or "none"
    return [
        *MLP,
        (rf"blocks\.({softmax})\.mixer_norm\.weight", r"model.layers.\1.feedforward_layer_norm.weight"),
        (rf"blocks\.({softmax})\.mlp_norm\.weight", r"model.layers.\1.post_feedforward_layernorm.weight"),
        (r"blocks\.(\d+)\.mixer_norm\.weight", r"model.layers.\1.attention_layer_norm.weight"),
        (r"blocks\.(\d+)\.mlp_norm\.weight", r"model.layers.\1.feedforward_layer_norm.weight"),
        (r"blocks\.(\d+)\.mixer\.norm\.weight", r"model.layers.\1.linear_attn.o_norm.weight"),
        (r"blocks\.(\d+)\.mixer\.out_proj\.weight", r"model.layers.\1.linear_attn.o_proj.weight"),
    ]


def olmo_cuts(values: dict[str, Any], in_file: list[int] | None = None) -> list[Cut]:
    """Where rows of our matrices lie in OLMo Hybrid's of this config. in_file: the rows of a file's three parts of the convolution, which
    transformers 5.24 cuts into thirds whatever the widths of queries, keys and values are; it joins what it reads."""
    keys, all_values = _widths(values)
    wanted = {"q": keys, "k": keys, "v": all_values}
    each = {"g": all_values, **wanted, **dict.fromkeys("ba", values["linear_num_value_heads"])}
    convolved = dict(zip("qkv", in_file)) if in_file is not None and sum(in_file) == 2 * keys + all_values else wanted
    return [
        (r"blocks\.(\d+)\.mixer\.in_proj\.weight", _behind(r"model.layers.\1.linear_attn.{}_proj.weight", each)),
        (r"blocks\.(\d+)\.mixer\.conv\.weight", _behind(r"model.layers.\1.linear_attn.{}_conv1d.weight", convolved)),
    ]


def _widths(values: dict[str, Any]) -> tuple[int, int]:
    """(channels of all keys, of all values)."""
    heads = values["linear_num_key_heads"], values["linear_num_value_heads"]
    return heads[0] * values["linear_key_head_dim"], heads[1] * values["linear_value_head_dim"]


def _behind(name: str, rows: dict[str, int]) -> list[tuple[str, int, int, int]]:
    """Parts of one matrix of ours, one behind the other, each a matrix of its own there."""
    parts, first = [], 0
    for key, count in rows.items():
        parts.append((name.format(key), 0, first, count))
        first += count
    return parts
