"""A whole training step as one CUDA graph, for models so small that launching their kernels takes longer than running them.

    step = GraphedStep(lambda ids, labels: train_on(ids, labels), device)
    loss, = step(ids, labels)                     # the first calls run as written, then one launch replays all of it

The step may do anything that needs no answer from the device: forward, backward, clipping, the optimizer. Its inputs are copied into fixed
tensors before a replay, and its outputs are fixed tensors that the next replay overwrites. On a CPU, and where a step cannot be captured,
it stays an ordinary call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.recording import undisturbed
from training.graph import leave_failed_capture

Step = Callable[..., tuple[Tensor, ...]]
WARMUP = 3  # ordinary calls before the capture: kernels are compiled and the optimizer's moments made in them


class Rate:
    """The learning rate of an optimizer, of which groups may take their own multiple; a tensor on the device where a graph must read it."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer, self.value, self.on_gpu = optimizer, -1.0, device.type == "cuda"
        for group in optimizer.param_groups:
            if self.on_gpu:
                group["lr"], group["capturable"] = torch.zeros((), device=device), True

    def set(self, rate: float) -> None:
        """Enqueues the change; steps launched before keep the old rate."""
        if rate == self.value:
            return
        self.value = rate
        for group in self.optimizer.param_groups:
            own = rate * group.get("lr_ratio", 1.0)
            if self.on_gpu:
                group["lr"].fill_(own)
            else:
                group["lr"] = own


class GraphedStep:
    """`step(*tensors) -> tensors`, captured at call number WARMUP + 1 on the current stream, which must not be the default one.

    All calls must be with tensors of the same shapes. why_not: why the step runs as written, empty while it is captured (or will be).
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self.step, self.calls = step, 0
        self.why_not = "" if device.type == "cuda" else "there is no GPU"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.why_not or self.calls <= WARMUP:
            return self.step(*tensors)
        if self.graph is None:
            self._capture(tensors)
            if self.why_not:
                return self.step(*tensors)
        assert self.graph is not None
        for fixed, new in zip(self.inputs, tensors, strict=True):
            if fixed.shape != new.shape:  # a row alone would be repeated into all rows
                raise ValueError(f"A captured step of tensors {tuple(fixed.shape)} was called with {tuple(new.shape)}.")
            if fixed is not new:
                fixed.copy_(new)
        self.graph.replay()
        return self.outputs

    def _capture(self, tensors: tuple[Tensor, ...]) -> None:
        """Records the step without running it; a step that cannot be recorded runs as written from here on."""
        self.inputs = tuple(t.clone() for t in tensors)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        torch.cuda.current_stream().synchronize()
        problem = ""
        with undisturbed():
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                self.outputs = self.step(*self.inputs)
            except Exception as error:
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            try:
                graph.capture_end()
            except RuntimeError as error:
                problem = problem or str(error).splitlines()[0]
        if problem:
            self.why_not = problem
            leave_failed_capture(self.inputs[0].device, torch.cuda.current_stream(), pool)
            warnings.warn(f"A training step was not captured as a CUDA graph and runs as written ({problem}).", stacklevel=3)
        else:
            self.graph = graph
