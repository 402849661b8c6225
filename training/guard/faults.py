"""What training does when something goes wrong: bad steps (non-finite, spikes) and requests to stop (SIGTERM, SIGINT, SIGUSR1)."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections import deque
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from data.files import finite
from training.config.schema import FaultSection
from training.errors import UserError
from training.result import StepResult


class BadStepPolicy:
    """Judges steps by the global loss, so that every rank decides alike, and counts what was left out."""

    def __init__(self, faults: FaultSection, log: Path | None) -> None:
        self.faults, self.log = faults, log
        self.recent: deque[float] = deque(maxlen=faults.spike_window)
        self.skips = 0

    @property
    def only_finite(self) -> bool:
        """Whether `judge` is against losses that are not finite, and no other."""
        return not self.faults.spike_factor

    def judge(self, loss: float) -> str:
        """Why a step with this mean loss must not be taken, or ''."""
        if not math.isfinite(loss):
            return "loss is not finite"
        if self.faults.spike_factor and len(self.recent) >= 8 and loss > self.faults.spike_factor * median(self.recent):
            return f"loss {loss:.3f} is over {self.faults.spike_factor:g}x the median {median(self.recent):.3f} of recent steps"
        return ""

    def state(self) -> dict[str, Any]:
        """For state.json: what later steps are judged by; `load` takes it back."""
        return {"recent": list(self.recent), "skips": self.skips}

    def load(self, state: dict[str, Any]) -> None:
        self.recent.extend(state["recent"])
        self.skips = state["skips"]

    def record(self, step: int, result: StepResult, sample_ids: list[int]) -> None:
        """Keeps a good loss; writes a bad step's batch and norms to faults.jsonl and stops the run where the policy says so. step: counted from 1, as in
        the log.

        Raises UserError when the policy is to stop, or when max_skips is passed. The weights are those before the step.
        """
        if not result.skipped:
            self.recent.append(result.loss)
            return
        self.skips += 1
        if self.log is not None:
            entry = {"step": step, "why": result.skipped, "loss": result.loss, "grad_norm": result.grad_norm, "sample_ids": sample_ids}
            with contextlib.suppress(OSError), self.log.open("a") as file:  # a full disk must not end rank 0 alone
                file.write(json.dumps(finite(entry)) + "\n")
        if self.faults.policy == "stop":
            mend = "lower optim.lr" if result.tokens else "give longer rows or more of them (train.seq_len, train.global_batch)"
            raise UserError(f"Step {step} was not taken: {result.skipped}; {mend}, or let faults.policy=skip leave such steps out.")
        if self.skips > self.faults.max_skips:
            raise UserError(
                f"Step {step} was not taken: {result.skipped}, and faults.max_skips={self.faults.max_skips} steps of the run were left out already;"
                " lower optim.lr, or raise faults.max_skips."
            )


class StopRequest:
    """Set by SIGTERM, SIGINT and SIGUSR1; training looks at it between steps, on all ranks together. A second SIGINT ends the process.

    A second SIGTERM does not: launchers send one to ranks that are already busy saving.
    """

    def __init__(self) -> None:
        self.signal = ""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> Any:
        if self.signal == "SIGINT" and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number).name
