"""The part of the weights, of Adam's moments and of Muon's momentum that lies on this rank, as views of live memory: checkpoints are read from and loaded into it.

A rank has stretches of flattened parameters: ZeRO-1 and 2 cut the moments of a whole group into equal stretches, ZeRO-3 cuts every parameter and
its moments. State that every rank has in full (all of it without ZeRO, the weights under ZeRO-1 and 2) is divided among the ranks for writing, so
that a checkpoint holds it once. Muon divides its momentum by matrices, whatever the number of ranks. Nothing here is gathered or sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum"


@dataclass
class Stretch:
    """Elements first .. first+len-1 of the flattened tensor `name`; values (len,): a view of live memory."""

    name: str
    first: int
    values: Tensor

    @property
    def end(self) -> int:
        return self.first + self.values.numel()


@dataclass(frozen=True)
class Piece:
    """Elements first .. first+count-1 of the flattened parameter `name` of `whole` elements, which lie from `start` on in a tensor."""

    name: str
    whole: int
    first: int
    count: int
    start: int


def share(stretches: list[Stretch], rank: int, size: int) -> list[Stretch]:
    """The part that `rank` of `size` writes of stretches that every rank has: an equal share of their elements; tensors are cut where a border
    falls."""
    total = sum(s.values.numel() for s in stretches)
    low, high = rank * total // size, (rank + 1) * total // size
    mine, passed = [], 0
    for s in stretches:
        n = s.values.numel()
        a, b = max(low - passed, 0), min(high - passed, n)
        if a < b:
            mine.append(Stretch(s.name, s.first + a, s.values[a:b]))
        passed += n
    return mine


def _whole(tensors: dict[str, Tensor]) -> list[Stretch]:
    return [Stretch(name, 0, tensor.detach().view(-1)) for name, tensor in tensors.items()]


def _swapped(engine: Any) -> bool:
    """Whether weights or moments lie on a disk between steps; DeepSpeed then hands out copies, on the device."""
    return "nvme" in (engine.config.deepspeed.offload_optimizer, engine.config.deepspeed.offload_parameters)


def local_weights(engine: Any) -> list[Stretch]:
    """This rank's fp32 weights: whole parameters, under ZeRO-3 its stretch of each (views, or copies where DeepSpeed keeps them on a disk)."""
    if engine.stage != 3:
        return _whole(engine.parameters)
    from deepspeed.utils import safe_get_local_fp32_param

    rank, stretches, swapped = engine.world.rank, [], _swapped(engine)
    for name, p in engine.parameters.items():
        n = p.ds_tensor.ds_numel  # of each rank's stretch; the last ones may be padding
        values = safe_get_local_fp32_param(p).cpu() if swapped else p.ds_tensor.detach()
        stretches.append(Stretch(name, rank * n, values.view(-1)[: max(0, min(n, p.ds_numel - rank * n))]))
    return [s for s in stretches if s.values.numel()]


def _with_moments(engine: Any) -> dict[str, Any]:
    """The parameters that AdamW updates."""
    return {name: p for name, p in engine.parameters.items() if name not in engine.matrices}


def local_momentum(engine: Any) -> list[Stretch]:
    """This rank's matrices of Muon's momentum, in the order of the parameters' elements; over the ranks every element comes once."""
    if not engine.matrices:
        return []
    order = {name: i for i, name in enumerate(engine.parameters)}
    stretches = [Stretch(slab.name, slab.first, values.view(-1)) for slab, values in engine.optimizer.momenta()]
    return sorted(stretches, key=lambda s: (order[s.name], s.first))


def local_moments(engine: Any, key: str) -> list[Stretch]:
    """This rank's stretches of AdamW's moment `key`; the optimizer must have stepped or been given moments."""
    inner = engine.deepspeed.optimizer
    if not engine.stage:
        return _whole({name: engine.optimizer.state[p][key] for name, p in _with_moments(engine).items()})
    if engine.stage == 3:
        from deepspeed.utils import safe_get_local_optimizer_state

        stretches, swapped = [], _swapped(engine)
        for s in local_weights(engine):
            p = engine.parameters[s.name]
            values = safe_get_local_optimizer_state(p, key).cpu() if swapped else inner._get_fp32_opt_state_partition(p, True, key)[0]
            stretches.append(Stretch(s.name, s.first, values.view(-1)[: s.values.numel()]))
        return stretches
    engine.link_moments()
    mapped = [(name, p._hp_mapping) for name, p in engine.parameters.items() if p._hp_mapping is not None]
    return [Stretch(name, m.lp_fragment_address.start, m.get_optim_state_fragment(key).view(-1)) for name, m in mapped]


def gradient_pieces(engine: Any) -> Iterator[tuple[Tensor, Piece]]:
    """(a tensor that the optimizer is about to update, a piece of it) for all parameters whose gradient is there now: `tensor.grad` holds them, padded
    to where ZeRO wants it. What is shared by ranks comes on each, what is cut on the one that has it."""
    ready = [tensor for group in engine.optimizer.param_groups for tensor in group["params"] if tensor.grad is not None]
    if not engine.stage:
        name_of = {id(p): name for name, p in engine.parameters.items()}
        yield from ((p, Piece(name_of[id(p)], p.numel(), 0, p.numel(), 0)) for p in ready)
    elif engine.stage == 3:
        inner, rank, name_of = engine.deepspeed.optimizer, engine.world.rank, {id(p): name for name, p in engine.parameters.items()}
        for flat, group in zip(inner.fp32_partitioned_groups_flat, inner.fp16_groups):
            start = 0
            for p in group if any(flat is tensor for tensor in ready) else ():
                n = p.ds_tensor.ds_numel
                count = max(0, min(n, p.ds_numel - rank * n))
                if count:
                    yield flat, Piece(name_of[id(p)], p.ds_numel, rank * n, count, start)
                start += n
    else:
        place = {tensor.untyped_storage().data_ptr(): tensor for tensor in ready}
        for name, p in engine.parameters.items():
            mapping = p._hp_mapping
            tensor = None if mapping is None else place.get(mapping.hp_fragment.untyped_storage().data_ptr())
            if tensor is not None:
                lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield tensor, Piece(name, p.numel(), lp.start, lp.numel, hp.start)


def to_write(engine: Any) -> Iterator[tuple[str, Stretch]]:
    """('model' or 'optimizer', stretch) for all that this rank writes; over the ranks every element comes once."""
    rank, size = engine.world.rank, engine.world.size
    weights = local_weights(engine)
    for s in weights if engine.stage == 3 else share(weights, rank, size):
        yield "model", s
    if engine.optimizer_steps():
        for key in MOMENTS:
            moments = local_moments(engine, key)
            for s in moments if engine.stage else share(moments, rank, size):
                yield "optimizer", Stretch(f"{key}.{s.name}", s.first, s.values)
        for s in local_momentum(engine):
            yield "optimizer", Stretch(f"{MOMENTUM}.{s.name}", s.first, s.values)


def elements_to_write(engine: Any) -> int:
    """How many fp32 numbers `to_write` gives once the optimizer has stepped."""
    weights = local_weights(engine)
    weights = weights if engine.stage == 3 else share(weights, engine.world.rank, engine.world.size)
    count = sum(s.values.numel() for s in weights)
    if engine.matrices:
        moments = share(_whole(_with_moments(engine)), engine.world.rank, engine.world.size)
        return count + 2 * sum(s.values.numel() for s in moments) + sum(s.values.numel() for s in local_momentum(engine))
    if engine.stage in (0, 3):
        return 3 * count
    return count + 2 * sum(p._hp_mapping.lp_fragment_address.numel for p in engine.parameters.values() if p._hp_mapping is not None)


def load_moments(engine: Any, read: Callable[[str, int, int], Tensor], steps: int) -> None:
    """Sets Adam's moments and Muon's momentum from `read(name, first, end)`, and the counter; works before the first step at any stage, each rank for itself."""
    flat = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_partitioned_groups_flat"}
    inner = engine.deepspeed.optimizer
    optimized = getattr(inner, flat[engine.stage]) if engine.stage else _with_moments(engine).values()
    for i, p in enumerate(optimized):
        away = _swapped(engine) and inner._swappable_optimizer_subgroup(i)
        if away:  # empty while it lies on the disk
            inner._optimizer_states_and_gradient_swap_in(i)
        engine.optimizer.state[p] = {
            "step": torch.tensor(float(steps), device=p.device),
            **{key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in MOMENTS},
        }
        if away:
            inner._optimizer_states_and_gradient_swap_out(i)
    for key in MOMENTS:
        for s in local_moments(engine, key):
            s.values.copy_(read(f"{key}.{s.name}", s.first, s.end))
            if _swapped(engine):
                _store(engine, s, key)
    for s in local_momentum(engine):
        s.values.copy_(read(f"{MOMENTUM}.{s.name}", s.first, s.end))


def _store(engine: Any, stretch: Stretch, key: str) -> None:
    """Gives a moment that lies on a disk back to DeepSpeed, padded as it keeps it."""
    from deepspeed.utils import safe_set_local_optimizer_state

    p = engine.parameters[stretch.name]
    values = torch.nn.functional.pad(stretch.values, (0, p.ds_tensor.ds_numel - stretch.values.numel()))
    safe_set_local_optimizer_state(p, values.to(engine.world.device), key)
