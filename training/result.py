"""What is known of a step: of its micro-batches before it, of its losses and gradients after it."""

from __future__ import annotations

from dataclasses import dataclass, field

from data.loader import Batch


@dataclass
class StepResult:
    """What one optimizer step measured, equal on all ranks but for the times.

    loss: mean nats per token; skipped: why the step was left out, or ''; seconds: without what `tell` took; communication: seconds of these in
    which this rank was in collectives, on a GPU also beside computation; told: the sums over ranks of what `tell` gave.
    """

    loss: float
    grad_norm: float
    tokens: int
    skipped: str
    seconds: float
    communication: float = 0.0
    told: list[float] = field(default_factory=list)


def local_tokens(micro_batches: list[Batch]) -> float:
    """How many labels this rank's micro-batches ask for; -100 asks for none."""
    return float(sum((batch.labels != -100).sum().item() for batch in micro_batches))
