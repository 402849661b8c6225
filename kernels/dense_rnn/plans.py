"""Plans that learn: how many slices a layer of dense heads is cut into, and from how far back their starts are guessed, by what its solves
needed lately.

A `Layer` has a choice in force for its states and one for its adjoints. Solves count what they needed into a row of one tensor on the device
(`Plans.counters`), which is copied to the host without waiting for it and read where training waits for the device anyway, at the end of a
step. From the counts of all ranks together every rank draws the same choices for the steps to come; within a step nothing changes, so that
passes that are made again for recomputation solve as they did. What was learnt goes into a checkpoint as JSON, whole: a run that goes on from
there chooses what it would have chosen. A CUDA graph holds the choices that it was captured with: capture it again when `decide` says so.

The cost of a choice is the number of steps that follow one another: burn-in, then a slice's length for the pass and for each correction,
then the time that is walked in order, of the slowest head.

Legend: T steps, n slices.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.dense_rnn.maps import Maps, Share
from kernels.dense_rnn.reference import Report

SLOTS = 5  # of a pass: largest residual, most corrections, heads of batch rows, slices of these that were walked in order, their slices
PERIOD = 8  # steps over which counts are gathered before a choice
STALE = 64  # choices after which what was seen of another counts no more
GAIN = 0.95  # share of the cost in force that another choice must promise
BURN_INS = (0, 16, 32, 64)
HALVINGS = 4  # of the slices that fill the device; behind the last of them is the walk in order
FEWEST = 4  # slices; with fewer it is the walk in order
FIRST_GUESS = 2.0  # corrections of slices of which nothing is known
WORDS = 3  # numbers that a pass of a layer tells the other ranks

Key = tuple[int, int]


@dataclass
class Pass:
    """The choice in force for one direction, and what was seen of it and of others: (corrections, share walked, when) by choice."""

    halvings: int = 0
    burn_in: int = 0  # longer ones are tried in turn; from a long one, which may need more corrections, none at all was not reached
    now: int = 0
    seen: dict[Key, tuple[float, float, int]] = field(default_factory=dict)
    sums: list[float] = field(default_factory=lambda: [0.0] * (WORDS + 1))  # over ranks and steps; at last how many they were
    reckoned: int = 1  # slices that fill the device, and steps, of the last solve
    T: int = 0

    def slices(self, reckoned: int, halvings: int | None = None) -> int:
        n = reckoned >> (self.halvings if halvings is None else halvings)
        return n if n >= FEWEST else 1

    def plan(self, reckoned: int, T: int, begin: int = 0) -> tuple[int, int]:
        """(slices, steps of burn-in) in force, where `reckoned` slices would fill the device. begin: the least burn-in until a first step has ended."""
        self.reckoned, self.T = reckoned, T
        if not self.now:
            self.burn_in = max(self.burn_in, next((b for b in BURN_INS if b >= begin), BURN_INS[-1]))
        n = self.slices(reckoned)
        return n, 0 if n == 1 else min(self.burn_in, -(-T // n))

    def cost(self, key: Key, corrections: float, walked: float) -> float:
        n = self.slices(self.reckoned, key[0])
        length = -(-self.T // n)
        return self.T if n == 1 else min(key[1], length) + length * (1 + corrections) + walked * self.T

    def expected(self, key: Key) -> float:
        """What a choice costs: as seen not long ago, or reckoned from the nearest that was: a notch of burn-in more saves a correction, and a shorter
        one costs none, until it was tried; slices twice as long save half of them and all walks."""
        mine = (self.halvings, self.burn_in)
        fresh = {k: v for k, v in self.seen.items() if self.now - v[2] < STALE or k == mine}
        if key in fresh:
            return self.cost(key, *fresh[key][:2])

        def notches(other: Key) -> tuple[int, int]:
            return key[0] - other[0], BURN_INS.index(key[1]) - BURN_INS.index(other[1])

        known = [k for k in fresh if self.slices(self.reckoned, k[0]) > 1]
        if not known:
            return self.cost(key, FIRST_GUESS, 0.0)
        nearest = min(known, key=lambda other: (sum(map(abs, notches(other))), -fresh[other][2], other))
        (corrections, walked, _), (fewer, longer) = fresh[nearest], notches(nearest)
        return self.cost(key, max(0.0, corrections * 0.5**fewer - max(0, longer)), 0.0 if fewer > 0 else walked)

    def add(self, corrections: float, walked: float, slices: float, times: int) -> None:
        self.sums = [a + b for a, b in zip(self.sums, (corrections, walked, slices, times))]

    def decide(self) -> bool:
        """Draws a choice from what was added; whether it is another than before."""
        corrections, walked, _, times = self.sums
        self.sums, self.now = [0.0] * (WORDS + 1), self.now + 1
        if not self.T or not times:
            return False
        mine = (self.halvings, self.burn_in)
        # one head that is walked takes as long as all: so many slices in a step are of one, as far as it has them
        self.seen[mine] = corrections / times, min(1.0, walked / times / self.slices(self.reckoned)), self.now
        keys = [k for k in itertools.product(range(HALVINGS + 1), BURN_INS) if self.slices(self.reckoned, k[0]) > 1 or k[1] == 0]
        best = min(keys, key=lambda key: (self.expected(key), key != mine))
        if self.expected(best) >= GAIN * self.expected(mine):
            return False
        before = self.plan(self.reckoned, self.T)
        self.halvings, self.burn_in = best
        return self.plan(self.reckoned, self.T) != before

    @property
    def failed(self) -> bool:
        """Whether all is walked in order because corrections of slices did not help lately."""
        walked = any(self.now - when < STALE and share > 0.5 for _, share, when in self.seen.values())
        return walked and self.reckoned >= FEWEST and self.slices(self.reckoned) == 1

    def state(self) -> dict[str, Any]:
        seen = [[*key, *value] for key, value in sorted(self.seen.items())]
        last = {"reckoned": self.reckoned, "T": self.T}
        return {"halvings": self.halvings, "burn_in": self.burn_in, "now": self.now, "seen": seen, "sums": self.sums, **last}

    def load(self, state: dict[str, Any]) -> None:
        self.halvings, self.burn_in, self.now = state["halvings"], state["burn_in"], state["now"]
        self.reckoned, self.T = state["reckoned"], state["T"]
        self.seen, self.sums = {(h, W): (c, w, when) for h, W, c, w, when in state["seen"]}, list(state["sums"])


class Layer:
    """A layer's choices. number: by which an op finds them (`find`); counters: where solves count, (2 SLOTS,); maps: the third way."""

    _numbers = itertools.count(1)

    def __init__(self, counters: Tensor) -> None:
        self.number, self.counters, self.passes, self.maps = next(self._numbers), counters, (Pass(), Pass()), Maps(counters.device)
        _layers[self.number] = self

    def note_walked(self, bad: Tensor, slices: int) -> None:
        """What a solve by composed maps needed: `bad` (B, E), the first slice of each head that was walked in order. Waits for nothing."""
        self.counters[2] += bad.numel()
        self.counters[3] += (slices - bad).sum()
        self.counters[4] += bad.numel() * slices

    def decide(self, share: Share) -> bool:
        """Draws choices from what was added; whether any is another than before."""
        states, adjoints = self.passes
        changed = adjoints.decide()
        _, walked, slices, _ = states.sums
        if self.maps.status not in ("tried", "on"):
            changed |= states.decide()
        else:
            states.sums = [0.0] * (WORDS + 1)
        return self.maps.decide(states.failed, walked / max(1.0, slices), share) or changed

    def sizes(self) -> list[float]:
        """What this rank's choices are reckoned with: its last solves and its device."""
        return [float(x) for one in self.passes for x in (one.reckoned, one.T)] + [*map(float, self.maps.shape), float(self.maps.programs)]

    def agree(self, sizes: list[float]) -> None:
        """Reckons with `sizes` of another rank, whose device may be another one."""
        reckoned, T, reckoned_back, T_back, *shape, self.maps.programs = map(int, sizes)
        for one, seen in zip(self.passes, ((reckoned, T), (reckoned_back, T_back))):
            one.reckoned, one.T = seen
        self.maps.shape = (shape[0], shape[1], shape[2], shape[3], shape[4])

    def note(self, back: bool, report: Report, heads: int) -> None:
        """What a solve in plain torch needed, in which nothing is walked in order."""
        mine = self.counters[back * SLOTS :]
        mine[0] = max(float(mine[0]), report.residual)
        mine[1] = max(float(mine[1]), float(report.corrections))
        mine[2], mine[4] = mine[2] + heads, mine[4] + heads * report.slices


_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()


def find(number: int) -> Layer | None:
    return _layers.get(number)


class Plans:
    """All layers that learn, in order. `collect` at the end of a step's passes, `words` once the device was waited for, `decide` with the sum of
    the words of all ranks."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.counters = torch.zeros(count, 2 * SLOTS, device=device)
        self.host = torch.zeros(count, 2 * SLOTS, pin_memory=device.type == "cuda")
        self.layers = [Layer(row) for row in self.counters]
        self.steps = 0
        self._since = [[0.0] * (WORDS + 1) for _ in range(2)]  # sums of words since the last report and of how many, of states and adjoints
        self._residual = [0.0, 0.0]

    def collect(self) -> None:
        """Begins to copy the counts of a step to the host, and sets them to zero."""
        self.host.copy_(self.counters, non_blocking=True)
        self.counters.zero_()

    def words(self) -> list[float]:
        """This rank's counts of a step: corrections, slices walked, slices, of states and adjoints of each layer."""
        self._residual = [max(self._residual[back], float(self.host[:, back * SLOTS].max())) for back in range(2)]
        return [float(row[back + i]) for row in self.host for back in (0, SLOTS) for i in (1, 3, 4)]

    def decide(self, words: list[float], ranks: int, share: Share = list) -> bool:
        """One more step, with the words of all ranks added up; share gives all ranks the first one's numbers. True: some layer solves otherwise from
        now on."""
        for i, one in enumerate(one for layer in self.layers for one in layer.passes):
            corrections, walked, slices = words[WORDS * i : WORDS * (i + 1)]
            one.add(corrections, walked, slices, ranks)
            self._since[i % 2] = [a + b for a, b in zip(self._since[i % 2], (corrections, walked, slices, ranks))]
        self.steps += 1
        if self.steps % PERIOD:
            return False
        agreed = iter(share([size for layer in self.layers for size in layer.sizes()]))
        for layer in self.layers:
            layer.agree([next(agreed) for _ in layer.sizes()])
        return any([layer.decide(share) for layer in self.layers])

    def report(self) -> dict[str, float]:
        """Of the steps since the last call, states and adjoints: corrections, a mean over layers, steps and ranks; the share of slices walked in order,
        of those solves that had several; slices and burn-in in force, means over layers; this rank's largest residual."""
        told: dict[str, float] = {}
        for back, name in enumerate(("", "_backward")):
            corrections, walked, slices, times = self._since[back]
            plans = [one.plan(one.reckoned, one.T) for one in (layer.passes[back] for layer in self.layers) if one.T]
            told |= {f"dense_corrections{name}": corrections / max(1.0, times), f"dense_walked{name}": walked / max(1.0, slices)}
            for i, what in enumerate(("slices", "burn_in")):
                told[f"dense_{what}{name}"] = sum(plan[i] for plan in plans) / max(1, len(plans))
            told[f"dense_residual{name}"] = self._residual[back]
        self._since, self._residual = [[0.0] * (WORDS + 1) for _ in range(2)], [0.0, 0.0]
        return told

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "layers": [[one.state() for one in layer.passes] for layer in self.layers],
            "maps": [x.maps.state() for x in self.layers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """What `state` gave. Raises ValueError if it is of another number of layers."""
        if len(state["layers"]) != len(self.layers):
            raise ValueError(f"The plans are of {len(state['layers'])} layers with dense heads, and there are {len(self.layers)}.")
        self.steps = state["steps"]
        for layer, passes in zip(self.layers, state["layers"]):
            for one, known in zip(layer.passes, passes):
                one.load(known)
        for layer, known in zip(self.layers, state.get("maps", [])):
            layer.maps.load(known)
