"""Everything that we change in DeepSpeed while it runs: one function for each change, with its reason.

All of them are for release 0.19.8 and were read in its source; those before it take a step whose gradients are not finite (`policy.check_tools`).
FINDS says for each where in DeepSpeed it reaches, and which text must stand there; tests/training/test_patches.py looks it up in the release that is installed. When a release makes a change
needless, its function, its row of FINDS and its one call go away.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.zero import norms
from training.zero.views import assert_within

EPS = 1e-6  # as DeepSpeed adds to the norm
LINEAR = nn.functional.linear

# patch -> ("module" or "module:object", a text that its source holds) of every place that the patch relies on
FINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "without_shared_memory_build": (
        ("deepspeed.ops", "__compatible_ops__"),
        ("deepspeed.ops.op_builder.cpu.comm", 'NAME = "deepspeed_shm_comm"'),
        ("deepspeed.comm.torch:build_shm_op", "ShareMemCommBuilder"),
    ),
    "load_muon_uncompiled": (
        ("deepspeed.runtime.compiler:compile", "torch.compile"),
        ("deepspeed.runtime.zero.muon.original_muon", "@compiler.compile()"),
        ("deepspeed.runtime.zero.stage_1_and_2", "import MuonWithAuxAdam"),
        ("deepspeed.runtime.zero.stage3", "import MuonWithAuxAdam"),
    ),
    "keep_gradients_in_place": (("deepspeed.runtime.engine:DeepSpeedEngine", "if self.enable_backward_allreduce and"),),
    "norm_in_few_launches": (
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "norm = self.get_grad_norm_direct(self.averaged_gradients[i], "),
        ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", "norm = self.get_grad_norm_direct(self.averaged_gradients[i], "),
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "_zero_padding"),
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.scaled_global_norm", "combine_grad_norm_groups(norm_groups, "),
        ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.step", "is_invalid_grad_norm(scaled_global_grad_norm)"),
    ),
    "clip_as_read": (
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step", "scaled_global_grad_norm = self.scaled_global_norm()"),
        ("deepspeed.runtime.utils:is_invalid_grad_norm", "return not isfinite(float(norm)) or norm < 0"),
    ),
    "divide_as_read": (
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step", "self.unscale_and_clip_grads([single_grad_partition], "),
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.unscale_and_clip_grads", "+ 1e-6) / self.clip_grad"),
        ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.unscale_and_clip_grads", "+ 1e-6) / self.clip_grad"),
    ),
    "gather_small_at_once": (
        ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._post_step", "[0].all_gather(self.persistent_parameters)"),
        ("deepspeed.runtime.zero.partition_parameters:Init", "param.all_gather = all_gather"),
        (
            "deepspeed.runtime.zero.partition_parameters:Init._allgather_params_coalesced",
            "param.data = gathered_tensor.narrow(0, 0, param.ds_numel)",
        ),
        ("deepspeed.runtime.zero.partition_parameters:Init._all_gather", "param.ds_status = ZeroParamStatus.AVAILABLE"),
    ),
    "list_parameters_once": (
        ("deepspeed.runtime.zero.partitioned_param_coordinator:get_all_parameters", "sub_module.named_parameters(recurse=recurse)"),
    ),
    "without_hooks": (("deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload", ".register_forward_pre_hook("),),
    "let_accumulators_go": (
        ("deepspeed.utils.tensor_fragment:get_hp_fragment_mapping", "lp_fragment_tensor = lp_param.flatten().narrow("),
        ("deepspeed.utils.tensor_fragment:tensor_fragment", "self.lp_fragment.data"),
    ),
    "link_moments": (
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "if not self._hp_optimizer_states_linked:"),
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state", ""),
    ),
    "hook_gradients": (
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.create_gradient_handling_hooks", "self._grad_acc_hooks.append("),
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step", "self._get_preflattened_grad_partition(i)"),
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._get_preflattened_grad_partition", '"flat_partition"'),
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "self.round_robin_bit16_groups.append("),
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "self.get_param_comm_dtype("),
    ),
    "keep_views": (
        (
            "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._update_model_bit16_weights",
            "p.data = flat_group.narrow(0, offset, meta.numel()).view(meta.shape).data",
        ),
        ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step", "self._update_model_bit16_weights(i)"),
    ),
    "keep_whole": (
        ("deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload._remove_module_hooks", "self.fwd_pre_hook.remove()"),
        (
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks",
            "self._grad_acc_hooks.append(register_grad_hook(",
        ),
        (
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.create_reduce_and_remove_grad_hooks",
            "self._leaf_module_hooks.append(",
        ),
        ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.step", "self._partition_all_parameters()"),
        ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._setup_for_real_optimizer", "bucket.buffer = torch.empty("),
    ),
    "take_flat_gradients": (
        (
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._prepare_fp32_grad_for_sub_group",
            ".grad = single_grad_partition",
        ),
        (
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._prepare_sub_group",
            "self._prepare_fp32_grad_for_sub_group(sub_group_id)",
        ),
        ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._setup_for_real_optimizer", "self.grad_partitions_flat_buffer"),
        ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.step", "combine_grad_norm_groups(norm_groups)"),
        ("deepspeed.runtime.utils:combine_grad_norm_groups", "if torch.is_tensor(norm) else torch.tensor(norm"),
    ),
    "gather_behind": (
        ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.step", "self._post_step(timer_names)"),
        ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._post_step", "if len(self.persistent_parameters) > 0:"),
        (
            "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters",
            "self.fp16_partitioned_groups_flat[sub_group_id].data.copy_(",
        ),
    ),
    "let_go": (
        ("deepspeed.runtime.zero.partition_parameters", "torch.nn.functional.linear = zero3_linear_wrap"),
        ("deepspeed.runtime.zero.parameter_offload", "FWD_MODULE_STACK.append("),
        ("deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator", "@functools.lru_cache"),
    ),
}


def without_shared_memory_build() -> None:
    """Has DeepSpeed go without its shared-memory collectives on a CPU, before the process group is made: the build of their C++ takes half a
    minute, and they serve inference only."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_muon_uncompiled() -> None:
    """Loads DeepSpeed's Muon without torch.compile. ZeRO loads it to ask whether an optimizer is one; its decorators would load the compiler for
    functions that nobody calls here, seconds of every start."""
    from deepspeed.runtime import compiler

    compile_all, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        with suppress(ImportError):
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_all


def keep_gradients_in_place(engine: Any) -> None:
    """Without ZeRO on a single rank: no reduction, for which DeepSpeed would copy all gradients into one tensor and back."""
    engine.enable_backward_allreduce = False


def norm_in_few_launches(optimizer: Any, device: torch.device) -> None:
    """Gives a ZeRO optimizer another norm of the gradients of a group of parameters, of which this rank holds a part; -1 if it is not finite.
    DeepSpeed's own copies every gradient to fp64 and reduces it by itself, and the GPU waits meanwhile."""

    def norm(gradients: Iterable[torch.Tensor], parameters: Any, norm_type: float = 2) -> torch.Tensor:
        known: torch.Tensor | None = getattr(gradients, "norm", None)  # of training/zero/at_once.py
        if known is not None:
            return known
        total = norms.squares([g.detach() for g in gradients if not getattr(g, "_zero_padding", False)], device)
        dist.all_reduce(total)
        return norms.root(total)

    optimizer.get_grad_norm_direct = norm


def clip_as_read(optimizer: Any) -> None:
    """Has a ZeRO-1/2 optimizer read the norm of all gradients once, and its AdamW divide them as it reads them. DeepSpeed reads the norm again for
    each group, behind the update of the group before, once more behind the gathering of weights, and goes over all gradients to divide them."""
    tensor_norm = optimizer.scaled_global_norm
    optimizer.scaled_global_norm = lambda norm_type=2: float(tensor_norm(norm_type))
    divide_as_read(optimizer)


def divide_as_read(optimizer: Any) -> None:
    """Has the AdamW of a ZeRO optimizer clip: it divides gradients as it reads them."""

    def clip(gradients: Any, norm: Any) -> None:
        divisor = (float(norm) + EPS) / optimizer.clip_grad if optimizer.clip_grad else 1.0
        divisor = min(divisor, torch.finfo(torch.float32).max) if math.isfinite(norm) else divisor  # AdamW leaves out a step at infinity
        optimizer.optimizer.grad_scale = torch.full((), divisor, device=optimizer.device) if divisor > 1 else None

    assert optimizer.loss_scale == 1, "losses are scaled in fp16 alone, which is not offered"
    optimizer.unscale_and_clip_grads = clip


def gather_small_at_once(optimizer: Any) -> None:
    """Has a ZeRO-3 optimizer gather the small parameters, which stay whole between its steps, in one collective. DeepSpeed sends each by itself, some
    hundred of a few thousand numbers, and waits for the device behind them."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    small = optimizer.persistent_parameters
    if not small:
        return
    one_by_one, group = small[0].all_gather, small[0].ds_process_group

    def all_gather(param_list: Any = None, *more: Any, **named: Any) -> Any:
        parts = [p.ds_tensor.detach().view(-1) for p in param_list] if param_list is small else []
        alike = all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in small) and len({(part.dtype, part.device) for part in parts}) == 1
        if not alike or more or named:
            return one_by_one(param_list, *more, **named)
        mine = torch.cat(parts)
        every = mine.new_empty(dist.get_world_size(group), mine.numel())
        dist.all_gather_into_tensor(every.view(-1), mine, group=group)
        for p, rows in zip(small, every.split([part.numel() for part in parts], 1)):
            p.data = rows.reshape(-1)[: p.ds_numel].view(p.ds_shape)
            p.ds_status = ZeroParamStatus.AVAILABLE
        return None

    small[0].all_gather = all_gather


def list_parameters_once(blocks: Iterable[nn.Module]) -> None:
    """Has every block that ZeRO-3 gathers as one remember its parameters. DeepSpeed asks for them six times a step, and torch walks the block's modules
    for each answer."""

    def remember(block: Any) -> None:
        asked, found = block.named_parameters, list(block.named_parameters())

        def named_parameters(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
            return iter(found) if recurse and remove_duplicate and not prefix else asked(prefix, recurse, remove_duplicate)

        block.named_parameters = named_parameters

    for block in blocks:
        remember(block)


def keep_whole(optimizer: Any) -> None:
    """Gives the parameters of a ZeRO-3 optimizer whole memory of their own, in which nobody has put the weights yet, and takes off the hooks that gather
    and let go of blocks and reduce gradients, with their buckets. training/zero/whole.py does both, once a step."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for hook in (*optimizer._grad_acc_hooks, *optimizer._leaf_module_hooks):
        hook.remove()
    optimizer.parameter_offload._remove_module_hooks()
    for bucket in optimizer.ipg_buckets.values():
        bucket.buffer = None
    divided = [p for parameters in optimizer.fp16_groups for p in parameters]
    still = [p for p in optimizer.module.parameters() if not any(p is other for other in divided)]
    if still:  # never updated, so gathered for good
        still[0].all_gather(still)
    for p in divided:
        p.data = torch.empty(p.ds_shape, dtype=p.ds_tensor.dtype, device=p.ds_tensor.device)
        p.ds_status = ZeroParamStatus.AVAILABLE
    optimizer._partition_all_parameters = lambda: None


def take_flat_gradients(optimizer: Any) -> None:
    """Has a ZeRO-3 optimizer take this rank's gradients of a group as the one tensor that they lie in, and read their norms once. DeepSpeed copies the
    gradients into another tensor; on a GPU it goes over that once more to clip, where AdamW may divide as it reads, and leaves the norm there, so that
    who asks for it waits for the update and the gathering as well."""

    def norms_of_groups() -> list[float]:
        values: list[float] = torch.stack([gradients.norm for _, gradients in sorted(optimizer.averaged_gradients.items())]).tolist()
        return values

    def prepare(group: int) -> None:
        optimizer.fp32_partitioned_groups_flat[group].grad = optimizer.averaged_gradients[group].flat_partition
        optimizer.averaged_gradients[group] = None

    optimizer._prepare_fp32_grad_for_sub_group, optimizer._get_norm_groups = prepare, norms_of_groups
    if optimizer.fp32_partitioned_groups_flat[0].is_cuda and optimizer.clip_grad:
        divide_as_read(optimizer)


def gather_behind(optimizer: Any, gather: Callable[[], None]) -> None:
    """Has a ZeRO-3 optimizer call `gather` behind its update in the place of gathering small parameters. DeepSpeed's update makes each parameter's part
    anew as well, a view of where it lies already."""
    ended, copies = optimizer._post_step, optimizer.fp16_partitioned_groups_flat
    optimizer.persistent_parameters = []
    for flat, parts in zip(copies, optimizer.fp16_partitioned_groups):
        assert_within(flat, parts, "parts")

    def reassign(group: int) -> None:
        masters = optimizer.fp32_partitioned_groups_flat[group]
        if copies[group].data_ptr() != masters.data_ptr():
            copies[group].data.copy_(masters.data)

    def post_step(timer_names: Any) -> None:
        ended(timer_names)
        gather()

    optimizer._reassign_or_swap_out_partitioned_parameters, optimizer._post_step = reassign, post_step


def keep_views(optimizer: Any) -> None:
    """Has a ZeRO-1/2 optimizer leave the parameters as they are after its step: they are views of the memory into which it gathers. DeepSpeed makes all of
    them anew, twice, while the device waits for the next pass."""
    for group, parameters in zip(optimizer.bit16_groups_flat, optimizer.bit16_groups):
        assert_within(group, parameters, "parameters")
    optimizer._update_model_bit16_weights = lambda group: None


def hook_gradients(optimizer: Any, on: bool) -> None:
    """Whether a ZeRO-1/2 optimizer follows each gradient by a hook and reduces it while the backward pass runs. A CUDA graph cannot hold that;
    training/zero/at_once.py reduces without, and leaves what those hooks would have left."""
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks.clear()
    if on:
        optimizer.create_gradient_handling_hooks()


def let_accumulators_go(optimizer: Any) -> None:
    """Cuts the views that a ZeRO-1/2 optimizer keeps of its parameters off from autograd. They keep alive the nodes that accumulate these parameters'
    gradients, on the stream on which the engine was made; a backward pass that is recorded on another stream may not touch that one, and fails."""
    for parameters in optimizer.bit16_groups:
        for parameter in parameters:
            if parameter._hp_mapping is not None:
                parameter._hp_mapping.lp_fragment = parameter._hp_mapping.lp_fragment.detach()


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Context in which one rank alone may run `model` under ZeRO-3: the hooks by which ZeRO-3 follows the order of submodules, and compares it
    over ranks, are off."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    hooks = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    try:
        for module, kind, _ in hooks:
            setattr(module, kind, OrderedDict())
        yield
    finally:
        for module, kind, before in hooks:
            setattr(module, kind, before)


def link_moments(optimizer: Any) -> None:
    """Maps the moments of all parameters of a ZeRO-1/2 optimizer, before they are read or written. DeepSpeed does so once, after the step of the
    first group, when the other groups have none yet."""
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def let_go(stage: int) -> None:
    """Undoes what an engine that was destroyed leaves behind for the life of the process at stage 3: a linear map in the place of torch's, which
    costs the host more, and the model with all of its optimizer in a stack and in a cache."""
    nn.functional.linear = LINEAR
    if stage != 3:
        return
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    for method in vars(partitioned_param_coordinator.PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # the cache is inside a wrapper that does not say so
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
