"""Cures of state collapse that need no training, each an option of an evaluation: `cures=NAME[:key=value...],NAME...`.

| name | acts on | source |
|---|---|---|
| retention | Mamba-2 scans, our delta rules | "forget more, insert less" (arXiv 2410.07145, section 5) |
| dt | Mamba-2 scans, gates of our delta rules | LongMamba (jzhang38): smaller step sizes; also MambaExtend with one constant |
| window | Mamba-2 scans | sliding window by difference of states (arXiv 2410.07145, section 5) |
| longmamba | Mamba-2 scans | LongMamba (Ye et al., arXiv 2504.16053): skipped tokens in global heads |
| clamp | every recurrent state | state normalisation of the first version of arXiv 2410.07145, applied between chunks |
| restart | every recurrent state | the reference any cure must beat: an empty state every r tokens |
| lambda | our attention layers | LM-Infinite (arXiv 2308.16137): Lambda mask with a cap on distances |

T is the training length. A cure applies to the layers it knows and leaves the others as they are. Just-read-twice prompting is an order of
retrieval tasks (evals/inputs/tasks.py); cures by training are state passing, fitted or random initial states and longer sequences (docs/long_context.md).
The methods themselves are in scan.py, state.py and attention.py: contexts in which the model is cured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from evals.adapters.base import Adapter
from evals.cures.attention import attention_layers, lambda_mask
from evals.cures.hooks import rule_layers, scan_layers
from evals.cures.scan import dt_scaling, longmamba, retention, window
from evals.cures.setting import Setting as Setting
from evals.cures.state import clamp, restart
from training.errors import UserError

CURES: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "retention": retention,
    "dt": dt_scaling,
    "window": window,
    "longmamba": longmamba,
    "clamp": clamp,
    "restart": restart,
    "lambda": lambda_mask,
}


@dataclass
class Cure:
    """A cure with the options that were given; the others have their defaults."""

    name: str
    options: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and options, as items and reports call it."""
        return "-".join([self.name, *(f"{k}{v:g}" for k, v in self.options.items())])

    def applied(self, adapter: Adapter, setting: Setting) -> AbstractContextManager[Any]:
        """The context in which the model is cured. Raises ItemError where nothing in the model can be."""
        return CURES[self.name](adapter, setting, **self.options)


def options_of(name: str) -> list[str]:
    """Names of a cure's options: what its function takes after the adapter and the setting."""
    return list(inspect.signature(CURES[name]).parameters)[2:]


def parse(text: str) -> list[Cure]:
    """The cures that a text such as `retention:b=0.75,dt:c=0.5` asks for. Raises UserError in one sentence."""
    chosen = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, *pairs = part.split(":")
        if name not in CURES:
            raise UserError(f"There is no cure {name!r}; choose from {', '.join(CURES)}, default or none.")
        options = {}
        for pair in pairs:
            key, _, value = pair.partition("=")
            try:
                options[key] = float(value)
            except ValueError:
                raise UserError(f"{part!r}: write a cure's options as NAME:key=number.") from None
            if key not in options_of(name):
                raise UserError(f"Cure {name} has no option {key!r}; it has {', '.join(options_of(name))}.")
        chosen.append(Cure(name, options))
    return chosen


def suitable(adapter: Adapter) -> list[Cure]:
    """The cures that are worth trying on this model: those that can act on one of its layers."""
    chosen = []
    if scan_layers(adapter) or rule_layers(adapter):
        chosen += [Cure("retention"), Cure("retention", {"b": 0.75})]
    if scan_layers(adapter) or any(mixer.config.gate for _, mixer in rule_layers(adapter)):
        chosen += [Cure("dt", {"c": 0.75}), Cure("dt", {"c": 0.5})]
    if scan_layers(adapter):
        chosen += [Cure("window"), Cure("longmamba")]
    state = adapter.advance(torch.zeros(1, 2, dtype=torch.long), adapter.start(1))
    if adapter.layer_states(state):
        chosen += [Cure("clamp"), Cure("restart")]
    if attention_layers(adapter):
        chosen.append(Cure("lambda"))
    return chosen
