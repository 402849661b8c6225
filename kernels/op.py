"""`define` makes an op: one name for torch.compile, autocast, activation checkpointing and shapes without storage, called without torch's dispatcher.

Every folder of an op reads alike: `__init__` has the public function, `reference` the same in plain torch, `triton` (and `launch`, where that is
much) the kernels, and `op` puts them together here.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import CustomOpDef, custom_op, infer_schema

from kernels.dispatch import is_eager, no_triton

Function = Callable[..., Any]


def runs_kernels(x: Tensor) -> bool:
    """Whether Triton kernels can run on this tensor: not for fp64, and only where Triton works on its device."""
    return x.dtype != torch.float64 and not no_triton(x.device)


def define(
    name: str,
    forward: Function,
    fake: Function,
    backward: Function | None = None,
    *,
    reference: Function | None = None,
    reference_backward: Function | None = None,
    fake_backward: Function | None = None,
    save: Function | None = None,
    materialize: bool = True,
    mutates: Sequence[str] = (),
) -> tuple[Function, CustomOpDef]:
    """(the function to call, the custom op everywhen::NAME underneath). The function runs the implementation as it is where nobody traces: the
    dispatcher takes 0.1 to 0.2 ms of the host's time a call (H200, under a profiler), as much as the kernels of a layer of 400M parameters take
    of the device's.

    forward: launches the kernels; its annotations are the op's schema (no `from __future__ import annotations` in its file). The first argument
    is a tensor, on whose device the kernels run.
    fake: empty tensors shaped, typed and laid out as the results.
    backward: (gradients of the results, what was saved) -> a tuple of the gradients of the first arguments, None for one that was None;
    annotated too.
    reference, reference_backward: the same in plain torch, where Triton cannot run; results may be of any dtype and layout. Without them
    `forward` and `backward` run everywhere.
    fake_backward: as `fake`, by default one empty tensor like each of the first tensors saved.
    save: (arguments, results) -> (tensors to save, other values), by default the arguments that are tensors and those that are not.
    materialize: False gives None to `backward` for a result that nobody differentiates, instead of zeros.
    mutates: names of arguments that are written over. An op without a backward is always called through the dispatcher, which refuses to
    differentiate it."""
    run = _chosen(forward, reference, fake, 0)
    op = custom_op(f"everywhen::{name}", run, mutates_args=mutates, schema=infer_schema(forward, mutates_args=mutates))
    op.register_fake(fake)
    if backward is None:
        return op, op
    first, gradients = _results(forward), _results(backward)  # place of the first saved tensor among the arguments of `backward`
    like = fake_backward or (
        lambda *saved_values: tuple(None if t is None else t.new_empty(t.shape) for t in saved_values[first : first + gradients])
    )
    run_back = _chosen(backward, reference_backward, like, first)
    back = _backward_op(name, run_back, like, first, _schema_of_gradients(backward))
    tensors = sum(p.annotation in (Tensor, Tensor | None) for p in inspect.signature(forward).parameters.values())

    def saved(ctx: Any, inputs: Any, output: Any) -> None:
        keep, ctx.settings = (inputs[:tensors], inputs[tensors:]) if save is None else save(inputs, output)
        ctx.save_for_backward(*keep)
        if not materialize:
            ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        keep, needed = ctx.saved_tensors, ctx.needs_input_grad  # read once: activation checkpointing unpacks a tensor a single time
        computed = (run_back if is_eager(keep[0]) else back)(*cotangents, *keep, *ctx.settings)
        return (*[g if is_needed else None for g, is_needed in zip(computed, needed)], *[None] * (len(needed) - gradients))

    op.register_autograd(differentiate, setup_context=saved)
    return _called(name, run, op, saved, differentiate), op


def _called(name: str, run: Function, op: CustomOpDef, saved: Function, differentiate: Function) -> Function:
    """The function that callers get: an autograd.Function around `run` in eager mode, the op while torch.compile traces."""

    # not in two functions: torch inspects the signature of `forward` at every call of those
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        saved(ctx, inputs, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(differentiate))}
    function = type(name, (torch.autograd.Function,), parts).apply  # type: ignore[attr-defined]

    def call(first: Tensor, *rest: Any) -> Any:
        return function(first, *rest) if is_eager(first) else op(first, *rest)

    return call


def _backward_op(name: str, run: Function, like: Function, first: int, schema: str) -> CustomOpDef:
    """everywhen::NAME_backward. A custom op may return neither None, nor one of its arguments, nor one tensor twice: it returns an empty tensor and
    copies instead."""

    def tensors_only(gradients: Sequence[Tensor | None], arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        return tuple(arguments[first].new_empty(0) if g is None else g for g in gradients)

    def implementation(*arguments: Any) -> tuple[Tensor, ...]:
        taken = {t.data_ptr() for t in arguments[:first] if t is not None and t.numel()}
        made = tensors_only(run(*arguments), arguments)
        # where the fakes lie, which compiled code relies on: kernels may write columns of one tensor
        shapes = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
        places = [t.stride() for t in tensors_only(like(*shapes), shapes)]
        made = tuple(
            g if g.stride() == s else torch.empty_strided(g.shape, s, dtype=g.dtype, device=g.device).copy_(g) for g, s in zip(made, places)
        )
        own = []
        for g in made:
            own.append(g.clone() if g.data_ptr() in taken else g)
            taken |= {own[-1].data_ptr()} if g.numel() else set()
        return tuple(own)

    back = custom_op(f"everywhen::{name}_backward", implementation, mutates_args=(), schema=schema)
    back.register_fake(lambda *arguments: tensors_only(like(*arguments), arguments))
    return back


def _chosen(kernels: Function, reference: Function | None, fake: Function, place: int) -> Function:
    """Runs `kernels`, or `reference` where kernels cannot run on the tensor at `place`. Results of the reference are copied into those of
    `fake`, so that both have the same dtype and layout."""

    def run(*inputs: Any) -> Any:
        x = inputs[place]
        if reference is None or (x.numel() and runs_kernels(x)):
            with torch.cuda.device_of(x):  # Triton launches on the current device
                return kernels(*inputs)
        results, empty = reference(*inputs), fake(*inputs)
        if isinstance(results, Tensor):
            return empty.copy_(results)
        return tuple(None if e is None else e.copy_(m) for e, m in zip(empty, results))

    return run


def _results(function: Function) -> int:
    """How many tensors `function` returns, by its annotation."""
    returned = inspect.signature(function).return_annotation
    return len(typing.get_args(returned)) if typing.get_origin(returned) is tuple else 1


def _schema_of_gradients(backward: Function) -> str:
    """The schema of a backward op, in which a gradient that may be None is a tensor: ops return nothing else."""

    def prototype() -> None: ...

    tensors = tuple.__class_getitem__((Tensor,) * _results(backward))
    prototype.__signature__ = inspect.signature(backward).replace(return_annotation=tensors)  # type: ignore[attr-defined]
    return infer_schema(prototype, mutates_args=())
