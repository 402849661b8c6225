"""How long this rank is in collectives: a stopwatch around torch.distributed's, DeepSpeed's included.

On a GPU the time is between two events on the stream that has to wait, read when they have passed, so that nothing is synchronised for
it. It holds what the network needs and what this rank waits for slower ones; the slowest rank therefore has the least of it. It is an upper
bound on how long the rank stands still: ZeRO waits on a stream of its own, and the model may go on computing meanwhile.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "barrier",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all",
    "all_to_all_single",
    "all_gather_single",
    "reduce_scatter_single",
)  # fmt: skip  (the last two are newer names, absent from older releases)


class _Timed:
    """A handle of an asynchronous collective whose `wait` is timed; everything else is the handle's own."""

    def __init__(self, handle: Any, clock: CommunicationClock) -> None:
        self._handle, self._clock = handle, clock

    def wait(self, *arguments: Any, **keywords: Any) -> Any:
        return self._clock.time(self._handle.wait, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


class CommunicationClock:
    """Seconds in collectives since the last `lap`. `install` before DeepSpeed is imported, as it keeps the functions it finds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.inside = device, 0.0, False
        self.events: list[tuple[Any, Any]] = []
        self.originals: dict[str, Any] = {}

    def install(self) -> None:
        """Puts timed functions in the place of torch.distributed's, for the life of the process group."""
        for name in (n for n in COLLECTIVES if hasattr(dist, n)):
            self.originals[name] = getattr(dist, name)
            setattr(dist, name, self._wrapped(self.originals[name]))

    def remove(self) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)
        self.originals.clear()

    def _wrapped(self, collective: Any) -> Any:
        @functools.wraps(collective)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            if torch.compiler.is_compiling() or self.inside:
                return collective(*arguments, **keywords)
            result = self.time(collective, *arguments, **keywords)
            return _Timed(result, self) if keywords.get("async_op") and result is not None else result

        return timed

    def time(self, call: Any, *arguments: Any, **keywords: Any) -> Any:
        """Calls `call` and adds its duration."""
        self.inside = True
        try:
            if self.device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                result = call(*arguments, **keywords)
                end.record()
                self.events.append((begin, end))
                return result
            began = time.perf_counter()
            result = call(*arguments, **keywords)
            self.seconds += time.perf_counter() - began
            return result
        finally:
            self.inside = False

    def lap(self) -> float:
        """Seconds since the last call, of the collectives that have ended; those still running count with the next one."""
        waiting = []
        for begin, end in self.events:
            if end.query():
                self.seconds += begin.elapsed_time(end) / 1000
            else:
                waiting.append((begin, end))
        passed, self.seconds, self.events = self.seconds, 0.0, waiting
        return passed
