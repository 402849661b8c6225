"""Attention layers of a trained model replaced by recurrent ones that begin from the attention's own weights (M1, arXiv 2504.10449; MaTVLM,
arXiv 2503.13440; Mamba in the Llama, arXiv 2408.15237): a hybrid that is then distilled (training/distill.py).

Attention reads W_q x, W_k x and W_v x; so do Mamba-2 (as C, B and x), the delta rule (q, k and v) and a cell (its candidate, from W_v), and W_o leads
back. Positions, query norms and biases of the attention have no place there and are left out. What has no counterpart (step sizes, gates,
convolutions) begins as in a new model, but that convolutions pass on the last input. Legend: H query heads, G key/value heads, K head width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from models import cells, mixers
from models.config import ModelConfig
from models.lm import LanguageModel

CANDIDATES = ("c", "n")  # what cells call the projection that a new state is made of


def targets() -> list[str]:
    """What attention can be replaced by: mamba2, delta, or a cell by its name."""
    return ["mamba2", "delta", *cells.available()]


def mapping_of(attention: Any, d_model: int, target: str) -> dict[str, Any]:
    """The config of the mixer that takes an attention's place, with its heads and their width. Raises UserError where there is none."""
    if target not in targets():
        raise UserError(f"attention cannot be replaced by {target!r}; choose one of {', '.join(targets())}.")
    H, K = attention.n_heads, attention.head_dim or d_model // attention.n_heads
    if target == "delta":
        return {"type": "delta", "n_heads": H, "head_dim": K, "output_gate": False}
    if target != "mamba2":
        return {"type": "rnn", "cell": target, "n_heads": H, "expand": H * K / d_model, "gate": False}
    if H * K % d_model:
        raise UserError(
            f"Mamba-2 takes the place of attention whose {H} heads of {K} are a multiple of the width {d_model}; choose delta instead."
        )
    return {"type": "mamba2", "d_state": K, "head_dim": K, "n_groups": H, "expand": H * K // d_model}


@torch.no_grad()
def sizes_of(teacher: LanguageModel, layers: Sequence[int], ids_BT: Tensor) -> dict[int, Tensor]:
    """Root mean squares (H K,), over the tokens of a text, of what each attention in `layers` hands to its last projection."""
    read: dict[int, Any] = {}
    hooks = [teacher.blocks[i].mixer.register_forward_pre_hook(lambda _, given, i=i: read.update({i: given})) for i in layers]
    try:
        teacher.read(ids_BT, None)
    finally:
        for hook in hooks:
            hook.remove()
    sizes = {}
    for i in layers:
        mixer: Any = teacher.blocks[i].mixer
        last = mixer.o_proj
        mixer.o_proj = torch.nn.Linear(last.in_features, last.in_features, bias=False, device=ids_BT.device, dtype=last.weight.dtype)
        mixer.o_proj.weight.copy_(torch.eye(last.in_features))
        try:
            sizes[i] = mixer(*read[i])[0].float().square().mean((0, 1)).sqrt()
        finally:
            mixer.o_proj = last
    return sizes


def converted(
    teacher: LanguageModel,
    layers: Sequence[int],
    target: str,
    seed: int = 0,
    copy_attention: bool = True,
    scale: float = 1.0,
    sizes: dict[int, Tensor] | None = None,
) -> LanguageModel:
    """`teacher` with other mixers in `layers`, on its device. copy_attention: whether these begin from the attention's weights, or anew.
    scale: of what copied mixers with a norm put out, beside the size that values have, or beside `sizes`, those measured by `sizes_of`.
    Raises UserError for layers that are no attention, and for a target that does not fit."""
    config = teacher.config
    names = [config.mixer_name(i) for i in range(config.n_layers)]
    used = {name: config.mixers[name] for name in names}
    for i in layers:
        if not 0 <= i < config.n_layers or used[names[i]]["type"] != "attention":
            attentions = [j for j, name in enumerate(names) if used[name]["type"] == "attention"]
            raise UserError(f"Layer {i} is no attention; these are {', '.join(map(str, attentions)) or 'none'}.")
    pattern, added = list(names), dict(used)
    for i in layers:
        attention = mixers.parse(names[i], used[names[i]], config.d_model)[0]
        pattern[i] = f"{target}_for_{names[i]}"
        added[pattern[i]] = mapping_of(attention, config.d_model, target)
    settings = {**config.to_dict(), "pattern": pattern, "mixers": {name: added[name] for name in dict.fromkeys(pattern)}}
    student = LanguageModel(ModelConfig.from_dict(settings))
    student.init_weights(seed)
    replaced = tuple(f"blocks.{i}.mixer." for i in layers)
    kept = {name: value for name, value in teacher.state_dict().items() if not name.startswith(replaced)}
    student.load_state_dict(kept, strict=False)
    for i in layers if copy_attention else ():
        with torch.no_grad():
            _begin_from(student.blocks[i].mixer, teacher.blocks[i].mixer, teacher.blocks[i].mixer_norm.weight, scale, (sizes or {}).get(i))
    return student.to(teacher.embedding.weight.device)


def _begin_from(mixer: Any, attention: Any, scale_D: Tensor, size: float, measured_I: Tensor | None) -> None:
    """The weights of `attention` in the new mixer. scale (D,): of the norm before both; size: a factor of what is put out;
    measured (H K,): the sizes that this is to have, channel by channel."""
    H, G, K = attention.H, attention.G, attention.K
    q = attention.q_proj.weight
    k, v = (p.weight.unflatten(0, (G, K)).repeat_interleave(H // G, 0).flatten(0, 1) for p in (attention.k_proj, attention.v_proj))
    mixer.out_proj.weight.copy_(attention.o_proj.weight)
    if mixer.conv is not None:
        mixer.conv.weight.zero_()
        mixer.conv.weight[:, -1] = 1
    if mixer.norm is not None:  # the norm gives outputs a size: that of values, of inputs of norm one, where none was measured
        weight = mixer.norm.weight
        if measured_I is None:
            measured_I = (v * scale_D).square().sum(1).mean().sqrt().expand(H * K)
        weight.copy_(size * measured_I.view(-1, weight.numel()).square().mean(0).sqrt())  # heads may share one scale
    {"mamba2": _mamba2, "delta": _delta, "rnn": _cell}[type(mixer).__module__.rpartition(".")[2]](mixer, q, k, v)


def _mamba2(mixer: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    _, x, B, C, _ = mixer.in_proj.weight.split([mixer.inner, mixer.inner, mixer.BC, mixer.BC, mixer.H])
    x.copy_(v), B.copy_(k), C.copy_(q)


def _delta(mixer: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    mixer.in_proj.weight[mixer.first : mixer.first + mixer.convolved].copy_(torch.cat([q, k, v]))


def _cell(mixer: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    mixer.in_proj.weight[: mixer.inner].copy_(v)
    names = [name for name in CANDIDATES if name in mixer.cell.pre]
    if names:
        width, place = mixer.cell_weight.shape[1], mixer.cell.pre.index(names[0])
        mixer.cell_weight[:, :, place * width : (place + 1) * width] = torch.eye(width, device=v.device)
