"""The only place that knows about DeepSpeed, ranks and devices.

`Engine` takes one optimizer step over a list of micro-batches so that the gradient is that of (summed token loss of the whole
global batch) / (its token count), whatever the split into ranks and micro-batches: DeepSpeed's own divisions are undone.
Parameters are always fp32; with precision bf16 the matrix products run in bf16 under autocast, recurrences stay fp32.
"""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from data.loader import Batch
from models.block import Block
from models.init import roles
from models.parallel import split
from training.config.schema import Config
from training.errors import UserError
from training.initial_state import InitialStates
from training.launch import USUAL, launch, unreachable
from training.optim import SkippableAdamW, build_optimizer
from training.watch.clock import CommunicationClock

LINEAR = nn.functional.linear


@dataclass
class World:
    """Where this process stands: rank among world_size, its device, and whether it speaks for all.

    sequence: neighbouring ranks that share rows and hold a slice of their time each; group: their process group; clock: of
    communication, None with a single rank.
    """

    rank: int
    size: int
    device: torch.device
    sequence: int = 1
    group: Any = None
    clock: CommunicationClock | None = None

    @property
    def replica(self) -> int:
        """Which of the `replicas` sets of rows this rank reads."""
        return self.rank // self.sequence

    @property
    def replicas(self) -> int:
        return self.size // self.sequence

    @property
    def slice_of(self) -> tuple[int, int]:
        """(n, N): this rank holds the n-th of N slices of time."""
        return self.rank % self.sequence, self.sequence

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks, in fp64; every rank gets the same numbers."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, values: list[float]) -> list[list[float]]:
        """The values of every rank, in order, on every rank."""
        table = [0.0] * (len(values) * self.size)
        table[len(values) * self.rank : len(values) * (self.rank + 1)] = values
        table = self.sum(table)
        return [table[a : a + len(values)] for a in range(0, len(table), len(values))]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def texts(self, own: str) -> list[str]:
        """The text of every rank, on every rank."""
        if self.size == 1:
            return [own]
        data = own.encode()
        lengths = [int(n) for n in self.sum([float(len(data)) if r == self.rank else 0.0 for r in range(self.size)])]
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=self.device)
        padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(found, padded)
        return [bytes(row[:n].tolist()).decode() for row, n in zip(found, lengths)]


def pick_device(wanted: str) -> torch.device:
    """auto | cpu | cuda to a device of this rank. Raises UserError when CUDA is asked for and absent."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"train.device is {wanted!r}; choose auto, cpu or cuda.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no CUDA device; use train.device=auto or install a CUDA build of torch.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start_distributed(wanted_device: str, timeout_minutes: float = 30.0, sequence: int = 1) -> World:
    """Joins the process group that the launcher described, or makes one of a single rank; every `sequence` ranks share rows."""
    launch()
    device = pick_device(wanted_device)
    for key, value in USUAL.items():
        os.environ.setdefault(key, value)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        torch.cuda.set_device(device)
    clock = CommunicationClock(device) if int(os.environ["WORLD_SIZE"]) > 1 else None
    if clock is not None:
        clock.install()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ build of half a minute, used for inference only
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        try:
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        except dist.DistNetworkError as error:
            raise unreachable(error) from error
    rank, size, group = dist.get_rank(), dist.get_world_size(), None
    for first in range(0, size, sequence) if sequence > 1 else ():  # every rank has to take part in making every group
        made = dist.new_group(list(range(first, first + sequence)), timeout=datetime.timedelta(minutes=timeout_minutes))
        group = made if first <= rank < first + sequence else group
    return World(rank, size, device, sequence, group, clock)


def load_muon_uncompiled() -> None:
    """ZeRO asks whether an optimizer is DeepSpeed's Muon, which it loads for that; loading it would load torch.compile for functions that
    are not called here, seconds of every start."""
    from deepspeed.runtime import compiler

    compile_all, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        with suppress(ImportError):
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_all


def check_tools(config: Config, device: torch.device) -> None:
    """Raises UserError where the chosen offload or quantisation needs something that DeepSpeed would have to compile and cannot."""
    ds, problems = config.deepspeed, []
    if "nvme" in (ds.offload_optimizer, ds.offload_parameters):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not (shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja") and AsyncIOBuilder().is_compatible(verbose=False)):
            problems.append(
                "Offload to nvme runs through DeepSpeed's async_io, which is compiled on first use; install a C++ compiler, ninja and libaio's"
                " headers (libaio-dev), or offload to cpu."
            )
    if ds.quantized_weights or ds.quantized_gradients:
        from deepspeed.ops.op_builder import QuantizerBuilder

        if device.type != "cuda" or not (
            shutil.which("nvcc") and shutil.which("ninja") and QuantizerBuilder().is_compatible(verbose=False)
        ):
            problems.append(
                "deepspeed.quantized_weights and quantized_gradients run through CUDA kernels that DeepSpeed compiles on first use; run on a GPU with"
                " nvcc and ninja installed, or set both to false."
            )
    if problems:
        raise UserError(problems)


def stage_of(config: Config, world_size: int) -> int:
    """The ZeRO stage that is run: the one asked for, but 0 where a single rank has nothing to split or to move to the host. Buckets, a copy of
    the weights and the host's work for each gradient would buy it nothing."""
    ds = config.deepspeed
    moves = ds.offload_optimizer != "none" or ds.offload_parameters != "none" or ds.quantized_weights or ds.quantized_gradients
    return ds.stage if world_size > 1 or moves else 0


def zero_run(config: Config, world_size: int) -> str:
    """What a run says of its ZeRO stage."""
    stage = config.deepspeed.stage
    return f"ZeRO {stage}" if stage_of(config, world_size) == stage else "no ZeRO on a single rank"


def overlaps(config: Config, world_size: int) -> bool:
    """Whether ZeRO communicates on a stream of its own while the model computes, for a second set of buckets. Stage 3 on the stream of the
    model would not let the host run ahead of the GPU: it waits for all but the last few parameters that were gathered."""
    stage = stage_of(config, world_size)
    return stage == 3 or (stage > 0 and world_size > 1 and config.deepspeed.offload_optimizer == "none")


def bucket_elements(config: Config, world_size: int, largest: int) -> int:
    """Gradients of a bucket of ZeRO; largest: elements of the largest parameter. Beside computation ZeRO-2 frees gradients that do not fit into
    a bucket while they are still being sent, so there every one has to."""
    own = config.deepspeed.bucket_bytes // 4
    return max(own, largest) if stage_of(config, world_size) == 2 and overlaps(config, world_size) else own


def deepspeed_config(config: Config, world_size: int, largest: int) -> dict[str, Any]:
    """DeepSpeed's JSON, owned by us: its defaults that change numerics are all set here. largest: elements of the largest parameter."""
    t, ds, stage = config.train, config.deepspeed, stage_of(config, world_size)
    bucket = bucket_elements(config, world_size, largest)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": ds.bucket_bytes // 4}
    if stage:
        zero |= {"overlap_comm": overlaps(config, world_size), "contiguous_gradients": True}
    if stage == 3:
        zero |= {"zero_hpz_partition_size": ds.hpz, "zero_quantized_weights": ds.quantized_weights}
        zero["zero_quantized_gradients"] = ds.quantized_gradients
    for key, device in {"offload_optimizer": ds.offload_optimizer, "offload_param": ds.offload_parameters}.items():
        if device != "none":
            zero[key] = {"device": device, "pin_memory": torch.cuda.is_available()}
        if device == "nvme":
            zero[key]["nvme_path"] = ds.nvme_path
    return {
        "train_micro_batch_size_per_gpu": t.micro_batch,
        "gradient_accumulation_steps": t.global_batch // (t.micro_batch * (world_size // config.parallel.sequence)),
        "gradient_clipping": t.grad_clip if stage else 0.0,  # without ZeRO by `Engine._gradient_norm`
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": t.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": None,
    }


@dataclass
class StepResult:
    """What one optimizer step measured, equal on all ranks but for the times. loss: mean nats per token; skipped: why it was left out, or '';
    communication: seconds of `seconds` in which this rank was in collectives, on a GPU also beside computation."""

    loss: float
    grad_norm: float
    tokens: int
    skipped: str
    seconds: float
    communication: float = 0.0


class Engine:
    """A DeepSpeed engine around a LanguageModel and AdamW."""

    def __init__(self, model: nn.Module, config: Config, world: World) -> None:
        import deepspeed

        check_tools(config, world.device)
        load_muon_uncompiled()
        self.config, self.world = config, world
        self.module = model.to(world.device)
        self.optimizer: SkippableAdamW = build_optimizer(
            model,
            lr=config.peak_lr,
            betas=(config.optim.betas[0], config.optim.betas[1]),
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
        )
        self.parameters = dict(model.named_parameters())
        if self.stage == 3:  # a block is gathered as one: a fetch for each of its dozen matrices and norms costs the host more
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        t = config.train
        self.initial = InitialStates(t.initial_state, t.initial_sigma, t.initial_drop, seed=config.seed * 65537 + world.rank)
        largest = max(p.numel() for p in self.parameters.values())
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=deepspeed_config(config, world.size, largest)
        )
        if world.size == 1 and not self.stage:  # which would copy all gradients into one tensor and back
            self.deepspeed.enable_backward_allreduce = False
        if self.stage and config.deepspeed.offload_optimizer == "none":
            self.deepspeed.optimizer.get_grad_norm_direct = self._norm_over_ranks
        self._assert_dtypes()
        if config.train.compile:
            self.deepspeed.compile()

    def _assert_dtypes(self) -> None:
        cast = [name for name, p in self.parameters.items() if "keep_fp32" in roles(p) and p.dtype != torch.float32]
        assert not cast, f"recurrence parameters must stay fp32, but DeepSpeed cast {cast}"

    @property
    def stage(self) -> int:
        return stage_of(self.config, self.world.size)

    def set_lr(self, lr: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def step(self, micro_batches: list[Batch], lr: float, is_bad: Any = None) -> StepResult:
        """One optimizer step. `is_bad(loss) -> str` may veto it from the global mean loss (an empty string lets it pass)."""
        start, clock = time.perf_counter(), self.world.clock
        if clock is not None:
            clock.lap()
        local_tokens = float(sum((batch.labels != -100).sum().item() for batch in micro_batches))
        tokens = self.world.sum([local_tokens])[0]
        scale = self.world.size / tokens  # DeepSpeed averages over ranks; the loss is a sum over tokens
        self.set_lr(lr)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self.deepspeed.set_gradient_accumulation_boundary(False)
        for index, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            batch = batch.to(self.world.device)
            start_state = self.initial.before(self.module, index, len(batch.labels), batch.segment_ids, self.config.data.reader == "stream")
            # Losses and gradients of slices are sums over tokens like those of rows, so the scale is the same for both.
            with split(self.module, self.world.group) if self.world.sequence > 1 else nullcontext():
                output = self.deepspeed(batch.input_ids, labels=batch.labels, segment_ids=batch.segment_ids, state=start_state)
                if start_state is not None:
                    self.initial.after(index, output.state)
                loss_sum += output.loss_sum.detach().double()
                self.deepspeed.backward((output.loss_sum + output.z_loss_sum) * scale, scale_wrt_gas=False)
        loss = self.world.sum([loss_sum.item()])[0] / tokens
        skipped = is_bad(loss) if is_bad else ""
        norm = self._gradient_norm()
        if not skipped and norm is not None and not _finite(norm):
            skipped = "gradient norm is not finite"
        self.optimizer.skip_next = bool(skipped)
        before = self.deepspeed.skipped_steps
        self.deepspeed.step()
        self.optimizer.skip_next = False
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
            norm = float(norm) if norm is not None else float("nan")
        if not skipped and (self.deepspeed.skipped_steps > before or not _finite(norm)):
            skipped = "gradient norm is not finite"
        return StepResult(loss, norm, int(tokens), skipped, time.perf_counter() - start, clock.lap() if clock is not None else 0.0)

    def _gradient_norm(self) -> float | None:
        """Norm before clipping where gradients are whole on every rank (stage 0), and clips them; ZeRO tells its own after the step."""
        if self.stage:
            return None
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if self.config.train.grad_clip:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.train.grad_clip, norm)
        return float(norm)

    def _norm_over_ranks(self, gradients: Iterable[torch.Tensor], parameters: Any, norm_type: float = 2) -> torch.Tensor:
        """The norm of a group of parameters from the gradients of this rank's part, -1 if it is not finite, in a few launches: DeepSpeed's own,
        for which this stands, copies every gradient to fp64, and the GPU waits meanwhile."""
        own = [g.detach() for g in gradients if not getattr(g, "_zero_padding", False)]
        squares = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if own:
            squares += torch.stack(torch._foreach_norm(own)).double().square().sum()
        dist.all_reduce(squares)
        return torch.where(squares.isfinite(), squares.sqrt(), -1.0).float()

    @contextmanager
    def gathered(self, names: Iterable[str]) -> Iterator[None]:
        """Context in which the named parameters are whole on every rank (ZeRO-3 splits them), and one rank alone may run the module: the
        hooks by which ZeRO-3 follows the order of submodules, and compares it over ranks, are off."""
        import deepspeed

        if self.stage != 3:
            yield
            return
        kinds = ("_forward_pre_hooks", "_forward_hooks")
        hooks = [(module, kind, getattr(module, kind)) for module in self.module.modules() for kind in kinds]
        with deepspeed.zero.GatheredParameters([self.parameters[name] for name in names]):
            try:
                for module, kind, _ in hooks:
                    setattr(module, kind, OrderedDict())
                yield
            finally:
                for module, kind, kept in hooks:
                    setattr(module, kind, kept)

    def link_moments(self) -> None:
        """Before reading or writing moments: ZeRO-1/2 maps them to parameters after the first group's first step, when the other
        groups have none yet, and never again by itself."""
        if self.stage in (1, 2):
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def optimizer_steps(self) -> int:
        """Updates the optimizer has made (Adam's own counter)."""
        steps = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return max(steps, default=0)

    def destroy(self) -> None:
        """Frees what DeepSpeed holds. Stage 3 leaves two things behind for the life of the process, undone here: a linear map in the place of
        torch's, which costs the host more, and the model with all of its optimizer in a stack and in a cache."""
        self.deepspeed.destroy()
        nn.functional.linear = LINEAR
        if self.stage == 3:
            from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

            parameter_offload.FWD_MODULE_STACK.clear()
            for method in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
                for cell in getattr(method, "__closure__", None) or ():  # the cache is inside a wrapper that does not say so
                    if hasattr(cell.cell_contents, "cache_clear"):
                        cell.cell_contents.cache_clear()

    def close(self) -> None:
        """Leaves the process group."""
        self.destroy()
        if self.world.clock is not None:
            self.world.clock.remove()
        if dist.is_initialized():
            dist.destroy_process_group()


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
