"""Which activations a training step computes again in its backward pass instead of keeping them: the setting train.activation_checkpointing.

Parts of a layer, from cheap to dear: swiglu (the MLP's product of gate and up, from these), states (what a recurrence with dense heads keeps of its
states, from those that slices of time start from), mlp (gate, up and their product, from the MLP's input), mixer, layer (all of it). A setting says
of which layers:

    none | full                 no layer, every layer
    2 | 0.5                     every second layer from the first on; the first half of the layers
    mlp | [swiglu, attention]   these parts of every layer; the name of a mixer stands for the mixers of its layers
    {mlp: 0.5, mixer: [0-3, 7]} parts and of which of the layers that have them: as above, or layers by their numbers from 0

The first layers free the most: what the last ones keep is wanted again at once. Numbers do not change by it; a device's kernels may differ in
the last bit between a stream that is added up within a block and one that is added up with the next norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data.errors import UserError
from models import mixers

if TYPE_CHECKING:
    from models.config import ModelConfig

Parts = frozenset[str]
PARTS = ("swiglu", "states", "mlp", "mixer", "layer")
FORMS = "none, full, auto, a number n for every n-th layer (below 1: a share), parts (swiglu, states, mlp, mixer, layer or a mixer's name), or {part: layers}"
NONE: Parts = frozenset()


def parts_by_layer(choice: Any, config: ModelConfig) -> list[Parts]:
    """What each layer computes again under a setting, or under parts by layer, which are passed on. Raises UserError with a sentence."""
    if isinstance(choice, list) and choice and all(isinstance(parts, frozenset) for parts in choice):
        return choice
    made = [NONE] * config.n_layers
    for part, amount in _mapping(choice).items():
        having = _layers_with(part, config)
        kind = part if part in PARTS else "mixer"
        for layer in _amount(amount, having, part, config.n_layers):
            made[layer] |= {kind}
    return [_simplest(parts, bool(config.mlp_width)) for parts in made]


def _simplest(parts: Parts, has_mlp: bool) -> Parts:
    """Without what is in another part of the same layer."""
    if "layer" in parts:
        return frozenset({"layer"})
    return parts - ({"swiglu"} if "mlp" in parts else set()) - ({"states"} if "mixer" in parts else set())


def keeps_states(config: ModelConfig, name: str) -> bool:
    """Whether the mixer of this name can make its states again (`remakes_states` of its Config)."""
    parsed, _ = mixers.parse(name, config.mixers[name], config.d_model)
    return bool(getattr(parsed, "remakes_states", False))


def _mapping(choice: Any) -> dict[str, Any]:
    """Parts and their amounts, whichever way the setting is written."""
    if choice is None or choice == "none":
        return {}
    if choice == "full" or isinstance(choice, (int, float)):
        return {"layer": 1 if choice == "full" else choice}
    if choice == "auto":
        raise UserError("train.activation_checkpointing=auto is settled by train.py; give here what dry_run=true says that it settles on.")
    if isinstance(choice, str):
        return {choice: 1}
    if isinstance(choice, (list, tuple)) and all(isinstance(part, str) for part in choice):
        return dict.fromkeys(choice, 1)
    if isinstance(choice, dict):
        return {str(part): amount for part, amount in choice.items()}
    raise UserError(f"train.activation_checkpointing is {choice!r}; it takes {FORMS}.")


def _layers_with(part: str, config: ModelConfig) -> list[int]:
    """The layers that have this part. Raises UserError where none has it."""
    every = range(config.n_layers)
    if part in ("swiglu", "mlp") and not config.mlp_width:
        raise UserError(f"train.activation_checkpointing names {part!r}, but the layers of this model have no MLP.")
    if part == "states":
        having = [i for i in every if keeps_states(config, config.mixer_name(i))]
        if not having:
            raise UserError(
                "train.activation_checkpointing names 'states', but no mixer of this model has dense heads of at most 64 channels and a state besides "
                "what it emits."
            )
        return having
    having = [i for i in every if part in PARTS or config.mixer_name(i) == part]
    if not having:
        names = ", ".join(dict.fromkeys(config.pattern))
        raise UserError(f"train.activation_checkpointing names {part!r}; it takes {FORMS}; the mixers are {names}.")
    return having


def _amount(amount: Any, having: list[int], part: str, n_layers: int) -> list[int]:
    """The layers among `having` that an amount means."""
    if isinstance(amount, (int, float)):
        if 0 < amount < 1 and not round(amount * len(having)) or len(having) < amount < float("inf"):
            less = "none" if amount < 1 else "the first one alone"
            raise UserError(
                f"train.activation_checkpointing says {amount:g} of {part!r}, which of the {len(having)} layers that have it is {less}; take a "
                f"number up to {len(having)}, a larger share, or layers by their numbers, as [0]."
            )
        if 0 <= amount < 1:
            return having[: round(amount * len(having))]
        if amount >= 1 and amount == int(amount):
            return having[:: int(amount)]
    else:
        chosen = [layer for item in (amount if isinstance(amount, (list, tuple)) else [amount]) for layer in _span(item)]
        if chosen and all(layer in having for layer in chosen):
            return chosen
    raise UserError(
        f"train.activation_checkpointing says {amount!r} of {part!r}; it takes n for every n-th layer, a share below 1, or layers by their "
        f"numbers, as [0-3, 7], of those that have it: {spans(having)}."
    )


def _span(item: Any) -> list[int]:
    first, dash, last = str(item).partition("-")
    if not first.isdigit() or dash and not last.isdigit():
        return [-1]
    return list(range(int(first), int(last or first) + 1))


def spans(layers: list[int]) -> str:
    """'0-3,7' of layers in ascending order."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ",".join("-".join(map(str, run)) for run in runs)


def setting(parts: list[Parts]) -> str:
    """The shortest way to write what each layer computes again as a setting."""
    rows = {part: [i for i, row in enumerate(parts) if part in row] for part in PARTS}
    every = {part for part, layers in rows.items() if len(layers) == len(parts)}
    some = {part: layers for part, layers in rows.items() if layers}
    if not some:
        return "none"
    if set(some) == every:
        return "full" if every == {"layer"} else next(iter(every)) if len(every) == 1 else f"[{','.join(p for p in PARTS if p in every)}]"
    return "{" + ",".join(f"{part}:1" if part in every else f"{part}:[{spans(layers)}]" for part, layers in some.items()) + "}"
