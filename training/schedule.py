"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to replay."""

from __future__ import annotations

import math

KINDS = ("cosine", "wsd", "linear", "constant")


def lr_factor(step: float, total: float, *, kind: str, warmup: int, decay: int = 0, final: float = 0.0) -> float:
    """Factor of the peak rate for optimizer step `step` (0-based) of `total`; both may be fractions, of a run that counts tokens.

    Warm-up rises linearly over `warmup` steps and is never zero. cosine and linear fall to `final`, which a step behind the last
    would have; wsd (warm-up, stable, decay) stays at 1 and falls so over the last `decay` steps, of which the first is still at 1;
    constant stays at 1.
    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"schedule.kind is {kind!r}; choose one of {', '.join(KINDS)}.")
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    if kind == "constant":
        return 1.0
    if kind == "wsd":
        left = total - step
        return 1.0 if left > decay or decay == 0 else final + (1.0 - final) * max(0.0, left) / decay
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0 - progress
    return final + (1.0 - final) * shape
