"""Forward and backward of a micro-batch as one CUDA graph: launching some thousand kernels one by one takes the host longer than the device
needs for many of them, replaying them takes it no time.

    graphed = GraphedPass(model, device, autocast=True)
    loss_sum = graphed.run(batch, scale)       # None: run it as written

A graph is of fixed shapes and fixed memory: batches are copied into its tensors, gradients lie in its own, and where the documents of a row end
is data. One graph is made for the first micro-batch of a step, whose gradients are written, and one for those that follow, whose gradients are
added. Nothing in a pass may wait for the device or depend on its numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import Batch
from kernels.linear import float8
from kernels.linear.ahead import Casts, room_of
from kernels.recording import undisturbed
from models.lm import LanguageModel
from models.segments import documents_in, most_documents
from training.config.schema import Config
from training.world import World

WARMUP = 2  # passes as written before a capture: kernels are compiled, and their libraries choose, in them
# Share of the device's memory up to which a run may fill it as written; a graph keeps its activations, so evaluation needs its own.
ROOM = 0.7


def release_random_numbers(device: torch.device) -> None:
    """After a capture that failed. torch leaves the device's generator of random numbers to the capture, and every later draw outside a graph
    would raise ("Offset increment outside graph capture"); a copy of it goes on where it stood."""
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    generator.graphsafe_set_state(generator.clone_state())


def leave_failed_capture(device: torch.device, stream: torch.cuda.Stream, pool: Any) -> None:
    """After a capture that failed. torch stays on the stream of the capture, and its allocator takes the capture for unfinished: it recycles no
    block any more that a second stream has used, which is all that ZeRO-3 gathers. stream: the one before; pool: of the capture."""
    torch.cuda.set_stream(stream)
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError):  # raised where the capture was ended after all
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    release_random_numbers(device)


def first_line(error: BaseException) -> str:
    """Of what ended a recording: its end says no more than that it has failed before."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().splitlines()[0]


def wanted(config: Config, ranks: int, model: nn.Module) -> bool:
    """Whether passes are to be CUDA graphs on a GPU: nothing but the model runs in them, and what it does and starts from is the same each time."""
    t = config.train
    alike = t.cuda_graph != "off" and not t.compile and t.initial_state == "zero" and config.data.reader != "stream"
    alike = alike and not getattr(model, "varies", False)
    return alike and (ranks == 1 or t.cuda_graph == "all" and config.parallel.sequence == 1)


def may_replay(config: Config, world: World, model: nn.Module) -> bool:
    """Whether a run's passes may be CUDA graphs."""
    return wanted(config, world.size, model) and world.device.type == "cuda"


class _Captured:
    """A graph with the tensors it reads and writes."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.input_ids, self.labels = batch.input_ids.to(device), batch.labels.to(device)
        self.segment_ids = None if batch.segment_ids is None else batch.segment_ids.to(device)
        self.scale = torch.zeros((), device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.gradients: list[Tensor | None] = []

    def fill(self, batch: Batch, scale: float) -> None:
        self.input_ids.copy_(batch.input_ids, non_blocking=True)
        self.labels.copy_(batch.labels, non_blocking=True)
        if self.segment_ids is not None and batch.segment_ids is not None:
            self.segment_ids.copy_(batch.segment_ids, non_blocking=True)
        self.scale.fill_(scale)


class GraphedPass:
    """why_not: why passes run as written from now on, or ''."""

    def __init__(self, module: LanguageModel, device: torch.device, autocast: bool) -> None:
        self.module, self.device, self.autocast = module, device, autocast
        self.why_not = ""
        self._news: list[str] = []
        self.calls: dict[tuple[object, ...], int] = {}
        self.graphs: dict[tuple[object, ...], _Captured] = {}
        self.casts = Casts()
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def news(self) -> list[str]:
        """Sentences about captures that succeeded or were given up since the last call."""
        sentences, self._news = self._news, []
        return sentences

    def forget(self) -> None:
        """Drops what was recorded: the model's passes are made of other operations from now on."""
        self.graphs.clear()
        self.casts.forget()
        self.calls.clear()

    def run(self, batch: Batch, scale: float) -> Tensor | None:
        """Adds the gradients of `scale` times the summed loss and returns the sum of token losses (fp64; the next call may write over it).
        None where the pass has to run as written: in the first calls, and for a batch that fits no graph."""
        if self.why_not:
            return None
        segments, adding = batch.segment_ids, self.parameters[0].grad is not None
        if segments is not None and documents_in(segments) > most_documents(segments.numel()):
            return None
        key = (batch.input_ids.shape, segments is not None, adding)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= WARMUP or adding and not self._graphs_own(key):
            return None
        if key not in self.graphs and not self._capture(key, batch):
            return None
        captured = self.graphs[key]
        captured.fill(batch, scale)
        self.casts.run()
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters, captured.gradients):
            parameter.grad = gradient
        return captured.loss_sum

    def _graphs_own(self, key: tuple[object, ...]) -> bool:
        """Whether the gradients to be added to are those that the first micro-batch's graph has written, the only ones that a graph adds to: a
        first micro-batch that ran as written has left others."""
        first = self.graphs.get((*key[:2], False))
        return first is not None and self.parameters[0].grad is first.gradients[0]

    def _capture(self, key: tuple[object, ...], batch: Batch) -> bool:
        """Records a pass without running it. False, with the reason in `why_not`, where it cannot be recorded."""
        reserved, total = torch.cuda.max_memory_reserved(self.device), torch.cuda.get_device_properties(self.device).total_memory
        if reserved > ROOM * total:
            return self._give_up(f"a step fills {reserved / total:.0%} of the device's memory, and a graph leaves less of it to evaluation")
        captured = _Captured(batch, self.device)
        pool = self.pool or torch.cuda.graph_pool_handle()
        before, stream = [p.grad for p in self.parameters], torch.cuda.current_stream(self.device)
        try:
            with undisturbed(), torch.cuda.graph(captured.graph, pool=pool, capture_error_mode="thread_local"), self._cast_ahead():
                loss_sum = self._pass(captured.input_ids, captured.labels, captured.segment_ids, captured.scale, cached=False)
                captured.loss_sum.copy_(loss_sum)
        except (RuntimeError, torch.AcceleratorError) as error:
            leave_failed_capture(self.device, stream, pool)
            self.casts.forget()
            for parameter, gradient in zip(self.parameters, before):
                parameter.grad = gradient
            return self._give_up(f"a pass cannot be recorded ({first_line(error)})")
        if not self.graphs:
            self._news.append("Forward and backward are replayed as a CUDA graph from here on; train.cuda_graph=off runs them as written.")
        captured.gradients = [p.grad for p in self.parameters]
        self.graphs[key] = captured
        return True

    def _cast_ahead(self) -> contextlib.AbstractContextManager[None]:
        """Casts lie in memory of their own then, so not where parts of blocks are computed again, which keep none of them meanwhile."""
        remade = any(getattr(block, "remade", ()) for block in getattr(self.module, "blocks", ()))
        if remade or float8.wanted or not self.autocast:
            return contextlib.nullcontext()
        return self.casts.recording(room_of(self.module), torch.bfloat16, self.device)

    @property
    def pool(self) -> Any:
        """The memory of the recorded passes, None where there are none."""
        return next((captured.graph.pool() for captured in self.graphs.values()), None)

    def say(self, sentence: str) -> None:
        """Adds to the news."""
        self._news.append(sentence)

    def _give_up(self, reason: str) -> bool:
        self.why_not = reason
        self._news.append(f"Forward and backward run as written, not as a CUDA graph: {reason}.")
        return False

    def as_written(self, batch: Batch, scale: float) -> Tensor:
        """The pass that `run` left, of a batch on the device; returns its sum of token losses (fp64)."""
        return self._pass(batch.input_ids, batch.labels, batch.segment_ids, scale, cached=True).double()

    def _pass(self, input_ids: Tensor, labels: Tensor, segment_ids: Tensor | None, scale: Tensor | float, cached: bool) -> Tensor:
        """Adds the gradients of `scale` times the summed loss; returns the sum of token losses. cached: weights are cast once for all their uses."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=cached):
            output = self.module(input_ids, labels=labels, segment_ids=segment_ids)
        assert output.loss_sum is not None and output.z_loss_sum is not None
        ((output.loss_sum + output.z_loss_sum) * scale).backward()
        return output.loss_sum.detach()


class GraphedUpdate:
    """What an optimizer computes from gradients, as CUDA graphs in the memory of the recorded passes: their activations are not needed by then.
    Muon's hundred launches take the host as long as the device, which has nothing else to do meanwhile."""

    def __init__(self, passes: GraphedPass) -> None:
        self.passes, self.divisor = passes, torch.ones((), device=passes.device)
        self.why_not, self.calls = "", 0
        self.key: Hashable = None
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.results: list[Tensor] = []

    def __call__(
        self, key: Hashable, compute: Sequence[Callable[[Tensor | None], Tensor]], divisor: Tensor | None
    ) -> Iterator[Tensor] | None:
        """The result of each of `compute`, called with `divisor`, when it is asked for, in their order; to be read before the next pass. None where they
        have to run as written: in the first calls with one key, which names all memory that they read and write."""
        pool = self.passes.pool
        key = (key, pool, divisor is None)
        if key != self.key:
            self.key, self.calls, self.graphs, self.results = key, 0, [], []
        self.calls += 1
        if self.why_not or pool is None or self.calls <= WARMUP:
            return None
        if divisor is not None:
            self.divisor.copy_(divisor)
        if not self.graphs and not self._capture(pool, compute, divisor is None):
            return None
        return self._replayed()

    def _replayed(self) -> Iterator[Tensor]:
        for graph, result in zip(self.graphs, self.results):
            graph.replay()
            yield result

    def _capture(self, pool: Any, compute: Sequence[Callable[[Tensor | None], Tensor]], whole: bool) -> bool:
        """A graph for each; what one has computed stays where it is while the next is recorded and run."""
        device = self.passes.device
        stream = torch.cuda.current_stream(device)
        for one in compute:
            graph = torch.cuda.CUDAGraph()
            try:
                with undisturbed(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self.results.append(one(None if whole else self.divisor))
            except (RuntimeError, torch.AcceleratorError) as error:
                leave_failed_capture(device, stream, pool)
                self.why_not, self.graphs, self.results = first_line(error), [], []
                self.passes.say(f"The optimizer's products run as written, not as a CUDA graph: {self.why_not}.")
                return False
            self.graphs.append(graph)
        return True
