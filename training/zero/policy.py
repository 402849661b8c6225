"""Which ZeRO a run gets: the stage, what is moved to the host, the buckets, and DeepSpeed's JSON with all of it."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch

from kernels.linear import float8
from training.config.schema import Config
from training.errors import UserError


def check_tools(config: Config, device: torch.device, world_size: int) -> None:
    """Raises UserError where the chosen offload or quantisation needs something that DeepSpeed would have to compile and cannot, products in 8
    bits something that the device has not, or ZeRO a release of DeepSpeed that leaves out a step whose gradients are not finite."""
    ds, problems = config.deepspeed, []
    if stage_of(config, world_size):
        from deepspeed import version
        from deepspeed.runtime import utils

        # before this function there was, -1 for such a norm was squared with the norms of other groups, and became a small one
        if not hasattr(utils, "combine_grad_norm_groups"):
            problems.append(
                f"DeepSpeed {version} takes the step of gradients that are not finite under ZeRO; install deepspeed>=0.19.8, or set deepspeed.stage=0."
            )
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
    if config.train.fp8 and (reason := float8.why_not(device)):
        problems.append(reason)
    if problems:
        raise UserError(problems)


def stage_of(config: Config, world_size: int) -> int:
    """The ZeRO stage that is run: the one that deepspeed.stage asks for, but 0 on a single rank that moves nothing to the host and quantises
    nothing. Such a rank has nothing to split, and would pay for buckets, a copy of the weights and work of the host for each gradient. 0 with Muon,
    which divides its own state over the ranks (training/optim/muon.py)."""
    ds = config.deepspeed
    if config.optim.kind == "muon":
        return 0
    moves = ds.offload_optimizer != "none" or ds.offload_parameters != "none" or ds.quantized_weights or ds.quantized_gradients
    return ds.stage if world_size > 1 or moves else 0


def zero_run(config: Config, world_size: int) -> str:
    """What a run says of its ZeRO stage."""
    stage = config.deepspeed.stage
    if config.optim.kind == "muon" and world_size > 1:
        return "Muon divided over the ranks in the place of ZeRO"
    return f"ZeRO {stage}" if stage_of(config, world_size) == stage else "no ZeRO on a single rank"


def may_reduce_at_once(config: Config, world_size: int) -> bool:
    """Whether a ZeRO stage can leave the reduction of gradients to training/zero/at_once.py or whole.py, so that passes can be CUDA graphs."""
    return (
        keeps_whole(config, world_size)
        or stage_of(config, world_size) in (1, 2)
        and world_size > 1
        and config.deepspeed.offload_optimizer == "none"
    )


def gathers_alike(config: Config, world_size: int) -> bool:
    """Whether ZeRO-3 gathers every parameter from all ranks' memory as it is: nothing lies elsewhere or in fewer bits."""
    ds = config.deepspeed
    plain = ds.hpz == 1 and not ds.quantized_weights and "none" == ds.offload_parameters == ds.offload_optimizer
    return stage_of(config, world_size) == 3 and world_size > 1 and plain


def keeps_whole(config: Config, world_size: int) -> bool:
    """Whether ZeRO-3 gathers weights and reduces gradients once a step, see training/zero/whole.py."""
    return config.deepspeed.gather == "step" and gathers_alike(config, world_size)


def overlaps(config: Config, world_size: int) -> bool:
    """Whether ZeRO communicates on a CUDA stream of its own while the model computes, which costs memory for a second set of buckets. Stage 3
    always does: on the model's stream the host would wait for nearly every gathered parameter instead of running ahead of the GPU."""
    stage = stage_of(config, world_size)
    return stage == 3 or (stage > 0 and world_size > 1 and config.deepspeed.offload_optimizer == "none")


def bucket_elements(config: Config, world_size: int, largest: int) -> int:
    """How many gradients (numbers) a bucket of ZeRO holds; largest: elements of the largest parameter. ZeRO-2 that overlaps communication frees
    a gradient that does not fit into a bucket while it is still being sent, so there a bucket takes the largest."""
    wanted = config.deepspeed.bucket_bytes // 4
    return max(wanted, largest) if stage_of(config, world_size) == 2 and overlaps(config, world_size) else wanted


# Layers whose gradients DeepSpeed sums in bf16 under its autocast; by default those that are nn.Linear and nothing more.
MATRICES = ["torch.nn.Linear", "models.head.Head", "models.layers.Embedding"]


def reduction(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """(DeepSpeed's settings, more of them for its autocast) of the dtype in which ranks sum gradients. Under its autocast ZeRO goes by the layer, in
    which recurrence parameters stay fp32; else one dtype serves all."""
    of_layers: dict[str, list[str] | None] = {"auto": None, "fp32": [], "bf16": MATRICES}
    layers, kind = of_layers[config.deepspeed.reduction], config.deepspeed.reduction
    return {} if kind == "auto" else {"communication_data_type": kind}, {} if layers is None else {"lower_precision_safe_modules": layers}


def deepspeed_config(config: Config, world_size: int, largest: int) -> dict[str, Any]:
    """DeepSpeed's JSON; every setting that changes numerics is written out here, none is left to its defaults. largest: elements of the largest
    parameter."""
    t, ds, stage = config.train, config.deepspeed, stage_of(config, world_size)
    bucket = bucket_elements(config, world_size, largest)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": ds.bucket_bytes // 4}
    if stage:
        zero |= {"overlap_comm": overlaps(config, world_size), "contiguous_gradients": True}
    if stage == 3:
        zero |= {"zero_hpz_partition_size": ds.hpz, "zero_quantized_weights": ds.quantized_weights}
        zero["zero_quantized_gradients"] = ds.quantized_gradients
        zero["memory_efficient_linear"] = not keeps_whole(config, world_size)  # which holds on to no weight that will be let go
    for key, device in {"offload_optimizer": ds.offload_optimizer, "offload_param": ds.offload_parameters}.items():
        if device != "none":
            zero[key] = {"device": device, "pin_memory": torch.cuda.is_available()}
        if device == "nvme":
            zero[key]["nvme_path"] = ds.nvme_path
    all_gradients, by_layer = reduction(config)
    return {
        **all_gradients,
        "train_micro_batch_size_per_gpu": t.micro_batch,
        "gradient_accumulation_steps": t.global_batch // (t.micro_batch * (world_size // config.parallel.sequence)),
        "gradient_clipping": t.grad_clip if stage else 0.0,  # without ZeRO by `Engine._gradient_norm`
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # It would wait for the device before every forward pass and after every step, which also ends the recording of a CUDA graph.
        "timers": {"throughput": {"enabled": False}},
        "torch_autocast": {"enabled": t.precision == "bf16", "dtype": "bfloat16", **by_layer},
        "steps_per_print": None,
    }
