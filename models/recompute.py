"""How parts of a block are computed again in the backward pass instead of being kept; which ones, models/remade.py reads from the settings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.linear import unread
from kernels.swiglu import swiglu
from models.remade import Parts

if TYPE_CHECKING:
    from models.layers import SwiGLU


class _Remaking(threading.local):
    now = False


_remaking = _Remaking()


@contextmanager
def _as_remade() -> Iterator[None]:
    before, _remaking.now = _remaking.now, True
    try:
        yield
    finally:
        _remaking.now = before


def again(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """function(...), which is called once more in the backward pass for the activations that it has not kept."""
    if torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)
    contexts: Any = lambda: (nullcontext(), _as_remade())  # noqa: E731
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **keywords)


def remaking(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as `again` calls it."""
    return lambda *arguments, **keywords: again(function, *arguments, **keywords)


def mlp(module: SwiGLU, x: Tensor, remade: Parts, last: bool = True) -> Tensor:
    """module(x) with what `remade` names of it computed again. last: it is the last thing that the block computes, so that its values need not
    be made again."""
    whole = _last if last else _as_it_is
    if "mlp" in remade:
        return again(whole, module, x)  # type: ignore[no-any-return]
    if "swiglu" in remade and not torch.compiler.is_compiling():  # a compiler settles by itself what is cheaper made again than kept
        return _from_gate_and_up(module, x)
    return whole(module, x)


def _as_it_is(module: SwiGLU, x: Tensor) -> Tensor:
    return module(x)  # type: ignore[no-any-return]


def _last(module: SwiGLU, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not _remaking.now or not module.one_last_product:
        return module(x)  # type: ignore[no-any-return]
    inner = module.inner(x)
    with unread():  # made again, only what the last product keeps is wanted of it
        return module.out(inner)


def _from_gate_and_up(module: SwiGLU, x: Tensor) -> Tensor:
    """module(x). The backward pass keeps gate and up anyway: what `out` would keep of their product is made again from them."""
    gate, up = module.gate_and_up(x)
    inner = swiglu(gate, up)
    storage, sources = inner.untyped_storage()._cdata, (gate.detach(), up.detach())

    def pack(tensor: Tensor) -> Any:
        return (tensor.shape, tensor.stride(), tensor.storage_offset()) if tensor.untyped_storage()._cdata == storage else tensor

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else swiglu(*sources).as_strided(*packed)  # a kind may keep it transposed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return module.out(inner)
