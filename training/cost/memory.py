"""How much memory a rank of a run needs, before it runs: `dry_run=true` prints it.

Activations are measured, not derived: one block of each kind and the head run forward and backward on tensors without storage, under a mode
that counts every allocation. A new mixer, kernel or kind of checkpointing is so counted without a formula of its own. Custom ops count with what
their fake implementations return, what has none asks `kernels.dispatch.planned()`, as attention does for the fused kernels of a GPU. What DeepSpeed holds is arithmetic (`Held`).
Not counted: the CUDA context and NCCL's buffers (0.5 to 2 GiB outside torch's allocator), fragmentation, the workspaces of kernels, evaluation.

Legend: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.dispatch import planning
from models.block import Block
from models.config import ModelConfig
from models.head import Head
from models.layers import RMSNorm
from models.remade import Parts, parts_by_layer, setting
from training.choices import choose_kernels, residual_dtype
from training.config.schema import Config
from training.graph import wanted
from training.optim import parameter_groups
from training.optim.muon import plan
from training.zero.policy import bucket_elements, keeps_whole, may_reduce_at_once, overlaps, stage_of, zero_run

GIB = 2**30
CUBLAS = 32 * 2**20  # bytes of workspace that torch allocates for matrix products on Hopper
PLAIN_BUCKET = 500_000_000  # elements DeepSpeed reduces at once without ZeRO
LIVE = 1_000_000_000  # elements of gathered parameters that ZeRO-3 lets live (its max_live_parameters)
SUB_GROUP = 1_000_000_000  # elements ZeRO-3 updates at once


class Ledger(TorchDispatchMode):
    """Bytes of the storages alive that were made inside, now and at most, in the 512-byte blocks of CUDA's allocator. `before`: tensors that were
    there already, of which ops may return views."""

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in before}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        output = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = -(-storage.nbytes() // 512) * 512
        self.now += self.live[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


@contextmanager
def _as_on_a_gpu(compiled: bool = False) -> Iterator[None]:
    """Kernels are chosen as on a GPU, in recomputation too, and tensors have no storage. compiled: as torch.compile sees them, where packed
    documents need a mask."""
    with planning(compiled), FakeTensorMode(allow_non_fake_inputs=True):
        yield


@dataclass
class Cost:
    """Bytes of one part of the model. saved: from its forward until its backward, its output stream and what it keeps of what the layer before owes
    included; forward, backward: at most beyond what was there when it began; gradients: of its parameters; cast: bf16 copies of its weights that
    autocast keeps until the whole forward pass has ended; output: of saved, the stream where only the part that reads it keeps it, and so no longer
    than until that part's backward."""

    saved: int
    forward: int
    backward: int
    gradients: int
    cast: int = 0
    output: int = 0


Run = Callable[[Tensor, Any], tuple[Tensor, Any]]  # stream and what is owed to it -> the same after a part


def _measure(run: Run, part: nn.Module, x: Tensor, bf16: bool, owed: torch.dtype | None = None) -> Cost:
    """Costs of run(x, owed), a part of the model with the parameters of `part`, on tensors without storage. owed: dtype of what the part before
    has still to add to the stream x, None where it owes nothing."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in part.parameters()]
    one = torch.zeros((), dtype=owed, requires_grad=True)
    ledger = Ledger([x, one, *part.parameters()])
    with ledger:
        entering = None if owed is None else (one.expand(x.shape).clone(), None)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y, owes = run(x, entering)
            cast = ledger.now
        cast, forward = cast - ledger.now, ledger.peak
        ends = [y] if owes is None else [y, owes[0]]
        edges, forms = [get_gradient_edge(end) for end in ends], [(end.shape, end.dtype) for end in ends]
        del entering, owes, ends
        saved = ledger.now
        del y
        before_backward = ledger.peak = ledger.now
        torch.autograd.backward(edges, [torch.empty(shape, dtype=dtype) for shape, dtype in forms])
        backward = ledger.peak - before_backward
    for hook in hooks:
        hook.remove()
    x.grad = None
    return Cost(saved, forward, backward, 4 * sum(p.numel() for p in part.parameters()), cast, saved - before_backward)


@dataclass
class Activations:
    """Costs of the embedding's output, of every layer and of norm, head and loss. tied: bytes of the gradient of a head that is the embedding too,
    which waits for that of the embedding."""

    embedding: int
    layers: list[Cost]
    head: Cost
    tied: int = 0

    def forward_peak(self) -> int:
        at, peak = self.embedding, 0
        for cost in self.layers:
            peak = max(peak, at + cost.forward)
            at += cost.saved + cost.cast
        return max(peak, at + self.head.forward)

    def backward_peak(self, gradients_stay: bool) -> int:
        """gradients_stay: see `Held`."""
        at = self.embedding + sum(cost.saved for cost in self.layers) + self.head.saved
        gradients, peak = 0, 0
        for cost in [self.head, *reversed(self.layers)]:
            gradients += cost.gradients if gradients_stay else 0
            peak = max(peak, at - cost.output + cost.backward + gradients)
            at += (self.tied if cost is self.head and not gradients_stay else 0) - cost.saved
        return peak


class Measured:
    """What the layers of one rank's micro-batch cost: a block of each kind of mixer is measured for each set of parts that it computes again, when
    it is first asked for, and norm, head and loss once."""

    def __init__(self, config: Config, settings: ModelConfig) -> None:
        t = config.train
        choose_kernels(t)
        self.config, self.settings = config, settings
        self.shape = t.micro_batch, t.seq_len // config.parallel.sequence, settings.d_model
        self.bf16 = t.precision == "bf16"
        self.stream = residual_dtype(t) or torch.float32
        self.costs: dict[Any, Cost] = {}

    def of(self, remade: list[Parts]) -> Activations:
        """remade: the parts that each layer computes again."""
        visits = self.settings.learnt_visits()
        owed = [
            i > 0 and "layer" not in remade[visits[i - 1]] for i in range(len(visits) + 1)
        ]  # whether the layer before leaves something to add
        layers = [self.layer(layer, remade[layer], owed[i]) for i, layer in enumerate(visits)]
        embedding = self.stream.itemsize * self.shape[0] * self.shape[1] * self.shape[2]
        tied = 4 * self.settings.vocab_size * self.shape[2] if self.settings.tie_embeddings else 0
        return Activations(embedding, layers, self._head(owed[-1]), tied)

    def _owed(self, owed: bool) -> torch.dtype | None:
        return None if not owed else torch.bfloat16 if self.bf16 else torch.float32

    def layer(self, layer: int, parts: Parts, owed: bool) -> Cost:
        """Of layer number `layer` with these parts computed again; owed: whether the layer before leaves something to add."""
        key = self.settings.mixer_name(layer), parts, owed
        if key not in self.costs:
            with _as_on_a_gpu(self.config.train.compile):
                x = torch.empty(self.shape, dtype=self.stream, requires_grad=True)
                segments = None if self.config.data.reader == "synthetic" else torch.zeros(self.shape[:2], dtype=torch.int32)
                block = Block(self.settings, layer).train()
                block.remade = parts
                self.costs[key] = _measure(lambda x, y: block.within(x, None, segments, None, y)[:2], block, x, self.bf16, self._owed(owed))
        return self.costs[key]

    def _head(self, owed: bool) -> Cost:
        key, settings = ("head", owed), self.settings
        if key not in self.costs:
            with _as_on_a_gpu(self.config.train.compile):
                x = torch.empty(self.shape, dtype=self.stream, requires_grad=True)
                norm, head = RMSNorm(settings.d_model), Head(settings.d_model, settings.vocab_size)
                labels_N = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.int64)

                def loss(x: Tensor, y: Any) -> tuple[Tensor, None]:
                    h_ND = (norm(x) if y is None else norm.after(x, *y)[1]).flatten(0, 1)
                    z_loss = settings.z_loss
                    nll_N, log_z_N = head(h_ND, labels_N, chunk=settings.head_chunk, recompute=settings.recompute_head, summed=not z_loss)
                    return nll_N.sum() + z_loss * log_z_N.square().sum() if z_loss else nll_N.sum(), None

                self.costs[key] = _measure(loss, nn.ModuleList([norm, head]), x, self.bf16, self._owed(owed))
        return self.costs[key]


def activations(config: Config, settings: ModelConfig, remade: list[Parts] | None = None) -> Activations:
    """Costs of one rank's micro-batch. remade: parts that each layer computes again, by default those that the config names."""
    return Measured(config, settings).of(parts_by_layer(remade or config.train.activation_checkpointing, settings))


@dataclass
class Held:
    """What DeepSpeed and the optimizer keep on one rank, in bytes, on the device unless said.

    weights, optimizer: there from step to step. During a pass: accumulated, gradients of earlier micro-batches; buckets, in which ZeRO gathers
    gradients to reduce them; partition, this rank's part of reduced gradients; gathered, parameters that ZeRO-3 has made whole. After the pass, at
    most on top of weights and optimizer: reduction, where gradients are reduced only then; update, in the optimizer step. host: in main memory,
    page-locked. gradients_stay: gradients of all parameters are there, whole, from where they are computed until after the pass.
    """

    weights: float
    optimizer: float
    accumulated: float
    buckets: float
    partition: float
    gathered: float
    reduction: float
    update: float
    host: float = 0.0
    gradients_stay: bool = field(default=False)


def held(config: Config, model: nn.Module, world: int) -> Held:
    """Over `world` ranks of the ZeRO stage that is run, see `training.zero.policy.stage_of`."""
    ds, stage, bf16 = config.deepspeed, stage_of(config, world), config.train.precision == "bf16"
    groups = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, 0.0)]
    P, largest = sum(groups), max(p.numel() for p in model.parameters())
    accumulates = config.train.global_batch > config.train.micro_batch * max(1, world // config.parallel.sequence)
    bucket, part = 4.0 * bucket_elements(config, world, largest), 4 * P / world
    to_host, buckets = (
        ds.offload_optimizer != "none",
        float(bucket * (2 if bf16 and ds.reduction != "fp32" else 1) * (2 if overlaps(config, world) else 1)),
    )
    if stage == 0:
        flat = 4 * min(P, PLAIN_BUCKET + largest) if world > 1 else 0
        moments, update = 8 * P, 0
        if config.optim.kind == "muon":
            matrices, momenta_here, update = plan(model, world)
            moments = 8 * (P - matrices) + 4 * momenta_here
        return Held(4 * P, moments, 4 * P * accumulates, 0, 0, 0, 4 * P + flat, 4 * P + update, gradients_stay=not accumulates)
    cast = bucket / 2 if bf16 else 0.0  # the copy of a bucket that is sent in bf16
    step = 4 * max(min(n, SUB_GROUP) if stage == 3 else n for n in groups) / world  # the gradients of a group, flat
    if keeps_whole(config, world):
        graph = 4 * P if wanted(config, world, model) else 0  # gradients lie in the graph's memory, in the update too
        after = 4 * P + bucket * (1 + 1 / world)
        return Held(4 * P + part, 4 * part, 4 * P * accumulates, 0, 0, 0, after, graph + bucket, gradients_stay=not accumulates)
    if stage == 3:
        buckets = bucket * (1.5 if bf16 else 1.0)
        gathered = 4.0 * min(P, LIVE) if world > 1 or ds.offload_parameters != "none" else 0.0
        weights = 0.0 if ds.offload_parameters != "none" else part
        host = (4 * part if to_host else 0.0) + (part if ds.offload_parameters != "none" else 0.0)
        if to_host:
            norm = 8 * largest / world  # a gradient in fp64 for its norm
            return Held(weights, 0, 0, buckets + cast, 0, gathered, 0, norm + buckets, host)
        return Held(weights, 4 * part, 0, buckets + cast, 0, gathered, 0, buckets + step, host)
    if to_host:
        temporary, all_gradients = 4.0 * largest, 4.0 * P
        if stage == 1:
            earlier, after = all_gradients * accumulates, all_gradients + buckets + cast
            return Held(4 * P + temporary, 0, earlier, buckets, 0, 0, after, 0, 5 * part, not accumulates)
        return Held(4 * P + temporary, 0, 0, buckets + cast, 0, 0, 0, 0, (5 + accumulates) * part)
    if wanted(config, world, model) and may_reduce_at_once(config, world):  # gradients lie in the graph's memory, in the update too
        after = 4 * P + part + bucket * (1 + 1 / world)
        return Held(4 * P, 3 * part, 4 * P * accumulates, 0, 0, 0, after, 4 * P + part, gradients_stay=not accumulates)
    if stage == 1:
        after = 4 * P + part + buckets + cast
        return Held(4 * P, 3 * part, 4 * P * accumulates, buckets, 0, 0, after, part + step, gradients_stay=not accumulates)
    return Held(4 * P, 3 * part, part * accumulates, buckets + cast, part, 0, 0, part * (1 + accumulates) + step)


@dataclass
class Estimate:
    """Bytes of one rank: what there is throughout, the highest moment of each phase, and the peak over all."""

    held: Held
    forward: float
    backward: float
    update: float
    gradients: float

    @property
    def peak(self) -> float:
        return max(self.forward, self.backward, self.update)

    @property
    def phase(self) -> str:
        phases = {"the forward pass": self.forward, "the backward pass": self.backward, "the update": self.update}
        return max(phases, key=lambda name: phases[name])


def estimate(config: Config, model: nn.Module, parts: Activations, world: int) -> Estimate:
    """The peak of one rank among `world`; `model` may lie on the meta device, `parts` is of `activations`."""
    h = held(config, model, world)
    always = h.weights + h.optimizer + CUBLAS
    early = h.buckets if stage_of(config, world) == 3 or h.accumulated else 0.0
    forward = always + h.accumulated + early + h.gathered + parts.forward_peak()
    backward = always + h.accumulated + h.buckets + h.partition + h.gathered + parts.backward_peak(h.gradients_stay)
    update = always + max(h.reduction, h.update)
    gradients = h.accumulated + h.partition if not h.gradients_stay else sum(4.0 * p.numel() for p in model.parameters())
    return Estimate(h, forward, backward, update, gradients)


WORLDS = (1, 2, 8, 64)


def report(config: Config, settings: ModelConfig, model: nn.Module, remade: list[Parts]) -> list[str]:
    """The lines of dry_run=true about memory: this config's parts on one rank, and the peak of every stage and number of ranks. remade: parts that
    each layer computes again."""
    t, ds = config.train, config.deepspeed
    parts = activations(config, settings, remade)
    alone = estimate(config, model, parts, config.parallel.sequence)
    h = alone.held
    optimizer_keeps = "Adam's and Muon's moments" if config.optim.kind == "muon" else "Adam, and ZeRO's fp32 master copy"
    rows = {
        "weights": h.weights,
        f"optimizer ({optimizer_keeps})": h.optimizer,
        "gradients": alone.gradients,
        "ZeRO's buckets": h.buckets,
        "parameters gathered by ZeRO-3": h.gathered,
        "activations kept for the backward pass": float(parts.embedding + sum(c.saved for c in parts.layers) + parts.head.saved),
        "norm, head and loss, at most": float(max(parts.head.forward, parts.head.backward)),
    }
    lines = [
        f"memory of a rank, GiB: {zero_run(config, config.parallel.sequence)}, {t.precision}, {t.micro_batch} x {t.seq_len // config.parallel.sequence} tokens"
    ]
    lines[0] += f", activation checkpointing {setting(remade)} (the CUDA context and NCCL, 0.5 to 2 GiB, come on top)"
    lines += [f"  {name:<48}{value / GIB:>8.2f}" for name, value in rows.items() if value]
    lines.append(f"  {'peak':<48}{alone.peak / GIB:>8.2f}  in {alone.phase}")
    if h.host:
        lines.append(f"  {'main memory for what is offloaded':<48}{h.host / GIB:>8.2f}")
    lines.append("  peak by ZeRO stage" + "".join(f"{world:>10} ranks" for world in WORLDS))
    for stage in (0, 1) if config.optim.kind == "muon" else (0, 1, 2, 3):
        section = replace(ds, stage=stage, offload_optimizer="none", offload_parameters="none")
        plan = replace(config, deepspeed=section)
        lines.append(f"  {stage:>18}" + "".join(f"{estimate(plan, model, parts, world).peak / GIB:>16.2f}" for world in WORLDS))
    return lines
