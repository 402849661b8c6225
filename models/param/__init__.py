"""Parametrisations: how starting values and learning rates follow the width. One file each: a dataclass Config and two functions,
`hidden_std(model_config, config)`, the spread at which hidden matrices start, and `prepare(model, config, drawn)`, called when the model is built
(tags of parameters: `rate`, the multiple of the learning rate) and, with `drawn`, after its weights were drawn (changes to these). The config is
model.param, the group configs/param."""

from __future__ import annotations

from typing import Any

from models.registry import Registry

PLAIN = "standard"
KINDS = Registry("models.param", "model.param", ("hidden_std", "prepare"))


def hidden_std(config: Any) -> float:
    """The standard deviation at which hidden matrices start."""
    module, settings = KINDS.settled(config.param, config)
    return module.hidden_std(config, settings)  # type: ignore[no-any-return]


def prepare(model: Any, drawn: bool) -> None:
    """Tags the parameters of a new model, or changes weights that were just drawn."""
    module, settings = KINDS.settled(model.config.param, model.config)
    module.prepare(model, settings, drawn)


def rates_of_its_own(config: dict[str, Any]) -> bool:
    """Whether a model section asks for another parametrisation than the plain one."""
    return (config.get("param") or {}).get("type", PLAIN) != PLAIN
