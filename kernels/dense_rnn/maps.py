"""When a layer's starts are found by composed maps (automata.py), the third way beside corrections and the walk in order; a part of its plan.

    off       solves go by slices or in order, as plans.py learns. Where corrections failed lately, so that all is walked in order, and the cost model
              says that composed maps would take fewer steps (long rows, few of them), the layer begins to look.
    looking   solves go on as before, and leave some of the states that they met. A few of these that lie farthest from each other are
              candidates, where almost all others lie near one: so it is with automata, and with no other recurrence. Else it looks again later.
    tried     solves go by composed maps for some steps. What was not certified was walked in order, so nothing is ever wrong.
    on        the trial was certified. Candidates are drawn anew when something was walked.
    refused   it was not: what is no automaton is never sent there again.

Nothing changes but between two steps, at a plan's choice. All ranks reckon with the first one's sizes and device (`Layer.agree`) and take the states
that it met, so that all choose alike and hold the same dictionary; it is part of the plan's state, bit for bit. On an H200 composed maps had the
walk's bits in every case and took less time wherever `slices_for` said so (docs/dense_rnn.md).
Legend: as in reference.py; M candidates, R states met.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.dense_rnn.dictionary import Dictionary, slices_for
from kernels.parallel_rnn.launch import multiprocessors

CANDIDATES = (8, 16, 32, 64, 128)
MET, ELEMENTS = 512, 1 << 18  # states that a solve leaves, of at most so many numbers together
REACH, MOST = (
    0.2,
    0.98,
)  # distance to a candidate (root mean square of shares of channels' sizes) within which this share of the states must lie
LATELY = 2  # choices in a row in which corrections failed
AGAIN = 64  # choices after which a layer whose states lay nowhere near a few looks again
WALKED = 0.25  # share of slices walked in order up to which a trial was a success

Share = Callable[[list[float]], list[float]]  # the first rank's numbers, for all


class Maps:
    """A layer's candidates, and whether its solves go by them. device: of its solves."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.status, self.failed = device, "off", 0
        self.dictionary: Tensor | None = None  # (E, M, S, K), where solves read it: it keeps its place while M stays
        self.met: Tensor | None = None  # (R, S, D)
        self.shape = (1, 1, 1, 1, 1)  # B, T, E, S, K of the last solve
        self.programs = 2 * multiprocessors(device)  # that run side by side, on the first rank's device

    def slices(self, M: int) -> int:
        """Slices that composing maps of M candidates takes in solves like the last one; 1: the walk in order is faster."""
        B, T, E, S, K = self.shape
        return slices_for(B, T, E, M, self.programs) if T > 1 else 1

    def in_force(self, pre: Tensor, mat: Tensor, S: int) -> tuple[Tensor, int] | None:
        """(candidates, slices) for a solve, or None."""
        E, K = mat.shape[:2]
        self.shape = (*pre.shape[:2], E, S, K)
        if self.status not in ("tried", "on") or self.dictionary is None or self.dictionary.shape[::2] != (E, S):
            return None
        n = self.slices(self.dictionary.shape[1])
        return (self.dictionary, n) if n > 1 else None

    def leave(self, emitted: Tensor, kept: Tensor) -> None:
        """Some of a solve's states, evenly over all rows and times, where they are asked for. Waits for nothing."""
        if self.status not in ("looking", "tried", "on"):
            return
        B, T, E, S, K = self.shape
        R = min(MET, max(1, ELEMENTS // (S * E * K)))
        rows = min(B, R)
        each = min(T, R // rows)
        if self.met is None or self.met.shape != (rows * each, S, E * K):
            self.met = torch.zeros(rows * each, S, E * K, device=emitted.device)
        apart = slice(T // each - 1, T // each * each, T // each)
        states = self.met.view(rows, each, S, E * K)
        states[:, :, :-1] = kept[:rows, apart]
        states[:, :, -1] = emitted[:rows, apart]

    def decide(self, failed: bool, walked: float, share: Share) -> bool:
        """One choice more. failed: all was walked in order because corrections did not help; walked: share of slices that were, since the last choice.
        True: solves go otherwise from now on, or leave states that they did not."""
        if self.status == "off":
            self.failed = self.failed + 1 if failed else min(0, self.failed)
            if self.failed >= LATELY and self.slices(CANDIDATES[0]) > 1:
                self.status = "looking"
            return self.status == "looking"
        if self.status == "looking":
            found = self._candidates(share, CANDIDATES)
            self.status, self.failed = ("off", -AGAIN) if found is None else ("tried", 0)
            self.dictionary = None if found is None else found.to(self.device)
            return True
        if self.status in ("tried", "on"):
            self.status = "on" if walked <= WALKED else "refused"
            if self.status == "refused":
                self.dictionary = self.met = None
                return True
            assert self.dictionary is not None
            if walked:
                anew = self._candidates(share, (self.dictionary.shape[1],))
                if anew is not None:
                    self.dictionary.copy_(anew)
        return False

    def _candidates(self, share: Share, numbers: tuple[int, ...]) -> Tensor | None:
        """The dictionary (E, M, S, K) of the fewest candidates near which almost all states lie that were met, if there are any."""
        B, T, E, S, K = self.shape
        if self.met is None:
            return None
        met = torch.tensor(share(self.met.flatten().tolist()), dtype=torch.float32).view(-1, S, E * K)
        for M in numbers:
            if M > len(met) or self.slices(M) == 1:
                return None
            dictionary = Dictionary(E, M, S, K)
            dictionary.learn(met)
            if dictionary.reach(met, MOST) <= REACH:
                return dictionary.states
        return None

    def state(self) -> dict[str, Any]:
        kept = None
        if self.dictionary is not None:
            kept = [list(self.dictionary.shape), base64.b64encode(self.dictionary.cpu().numpy().tobytes()).decode()]
        return {"status": self.status, "failed": self.failed, "programs": self.programs, "dictionary": kept}

    def load(self, state: dict[str, Any]) -> None:
        self.status, self.failed, kept = state["status"], state["failed"], state["dictionary"]
        self.programs = state.get("programs", self.programs)
        self.dictionary = None
        if kept is not None:
            values = np.frombuffer(base64.b64decode(kept[1]), np.float32).copy()
            self.dictionary = torch.from_numpy(values).view(kept[0]).to(self.device)
