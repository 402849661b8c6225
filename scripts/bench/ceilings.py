"""What a step's parts could take at best on the card that ran it: products as long as the same products take one after the other, the rest as long as
its bytes take at the bandwidth of a copy, measured in the same process.

Counted is a step as written. A kernel of Triton moves each tensor it is given once (what it leaves out of a tensor counts too), an operation of torch
reads its arguments and writes its results. Attention is that of torch, alone, at the same shape. So a part near its ceiling can only be made
faster by moving fewer bytes, or by other products. Products and attention are timed on a card that is as warm as in a step (`ceiling_ms`), and once
more with pauses between the calls (`rested_ms`): clocks at the limit of power are lower than those of a card that rests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.bench.timing import copy_bandwidth, milliseconds

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "is_pinned", "_local_scalar_dense"}
LARGEST = 5  # parts of the table
WARM, CALLS = 300, 12  # products of 1.1 TFLOP before times are taken, half a second of them; calls of a time
# kernel -> bytes that it moves beyond the tensors it is given: what a table has the addresses of, and what is written over after it was read
BESIDE: dict[str, Callable[[dict[str, Any]], int]] = {
    "total_squares": lambda given: 4 * int(given["SIZES"].sum()),
    "adamw_step": lambda given: 28 * int(given["SIZES"].sum()),  # weights and two moments read and written, gradients read
    "muon_momentum": lambda given: 8 * given["M"].numel(),
    "muon_step": lambda given: 8 * given["U"].numel(),
    "losses_and_gradient": lambda given: given["LOGITS"].numel() * given["LOGITS"].element_size(),
    "logits_gradient": lambda given: given["LOGITS"].numel() * given["LOGITS"].element_size(),
}

Product = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]  # operation, arguments with shapes in the place of tensors, named ones


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _shape(value: Any) -> Any:
    return (tuple(value.shape), tuple(value.stride()), value.dtype) if isinstance(value, Tensor) else value


class Calls(TorchDispatchMode):
    """Products by what they were given, shapes of attention, and bytes of all else by a word that names the kernel or operation."""

    def __init__(self) -> None:
        super().__init__()
        self.products: dict[Product, int] = {}
        self.attention: dict[tuple[int, ...], int] = {}
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        output, keywords = function(*arguments, **(keywords or {})), keywords or {}
        name = function._schema.name.split("::")[-1]
        if name in PRODUCTS:
            out = keywords.get("out")
            named = tuple((k, _shape(v)) for k, v in keywords.items() if k != "out") + ((("out", _shape(out)),) if out is not None else ())
            key = (function, tuple(_shape(a) for a in arguments), named)
            self.products[key] = self.products.get(key, 0) + 1
        elif "attention" in name and "backward" not in name:
            shape = tuple(arguments[0].shape)
            self.attention[shape] = self.attention.get(shape, 0) + 1
        elif "attention" not in name and name not in FREE:
            self._moved(
                name, [*tree_leaves(arguments), *tree_leaves(keywords)], _written(function, arguments, keywords), tree_leaves(output)
            )
        return output

    def _moved(self, name: str, given: list[Any], written: list[Tensor], made: list[Any]) -> None:
        read = {t.untyped_storage()._cdata: t for t in given if isinstance(t, Tensor)}
        new = [t for t in made if isinstance(t, Tensor) and t.untyped_storage()._cdata not in read]
        if not new and not written:
            return  # a view
        total = sum(_bytes(t) for t in [*read.values(), *new])
        if name not in ("copy_", "fill_", "zero_", "_foreach_copy_"):
            total += sum(_bytes(t) for t in written)  # read and written
        self.bytes[name] = self.bytes.get(name, 0) + total

    def launched(self, name: str, given: dict[str, Any]) -> None:
        read = {
            (t.data_ptr(), t.numel()): t for t in given.values() if isinstance(t, Tensor)
        }  # one given twice stands where none is wanted
        total = sum(t.numel() * t.element_size() for t in read.values())
        self.bytes[name] = self.bytes.get(name, 0) + total + BESIDE.get(name, lambda given: 0)(given)


def _written(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor]:
    """What an operation of torch reads and writes over, tensors of lists too. Fused AdamW's gradients are among it where they are divided: it writes them
    back."""
    written: list[Any] = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out:
            value = arguments[i] if i < len(arguments) else keywords.get(argument.name)
            if argument.name != "grads" or keywords.get("grad_scale") is not None:
                written += tree_leaves(value)
    return [t for t in written if isinstance(t, Tensor)]


@contextmanager
def _launches(calls: Calls) -> Iterator[None]:
    """Inside, launches of Triton kernels are counted too."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = {k: v for k, v in keywords.items() if k not in ("grid", "warmup")}
        calls.launched(self.fn.__name__, dict(zip(self.arg_names, arguments)) | given)
        return run(self, *arguments, **keywords)

    JITFunction.run = counted
    try:
        yield
    finally:
        JITFunction.run = run


def counted(step: Callable[[], Any]) -> Calls:
    """What a step as written launches."""
    calls = Calls()
    with _launches(calls), calls:
        step()
    return calls


def _warm(device: torch.device) -> None:
    """Keeps a GPU at products until its clocks are those of long work."""
    if device.type == "cuda":
        x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        for _ in range(WARM):
            x @ x


def _busy(f: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call among calls that follow each other."""
    if device.type != "cuda":
        return milliseconds(f, 3, device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    f()
    start.record()
    for _ in range(CALLS):
        f()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / CALLS


def _given(product: Product, device: torch.device) -> Callable[[], Any]:
    """A product on random numbers."""
    function, arguments, named = product

    def tensor(value: Any) -> Any:
        if not (isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], torch.dtype)):
            return value
        shape, stride, dtype = value
        made = torch.empty_strided(shape, stride, dtype=torch.float32 if dtype.itemsize == 1 else dtype, device=device).normal_()
        return made.to(dtype)

    given, options = [tensor(a) for a in arguments], {k: tensor(v) for k, v in named}
    return lambda: function(*given, **options)


def _attention(shape: tuple[int, ...], device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """torch's causal attention in bf16, forward and backward."""
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    d = torch.randn(shape, device=device, dtype=torch.bfloat16)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    y = forward()
    return forward, lambda: torch.autograd.grad(y, (q, k, v), d, retain_graph=True)


def _both_ways(calls: Calls, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of a step's products and attention among others of their kind, and of those with pauses."""
    ways: list[dict[str, float]] = []
    for time in (_busy, lambda f, device: milliseconds(f, 8, device)):
        if time is _busy:
            _warm(device)
        products = sum(count * time(_given(product, device), device) for product, count in calls.products.items())
        attention = sum(count * time(f, device) for shape, count in calls.attention.items() for f in _attention(shape, device))
        ways.append({"products": products, "attention": attention})
    return ways[0], ways[1]


def table(step: Callable[[], Any], parts_ms: dict[str, float], part_of: Callable[[str], str], device: torch.device) -> dict[str, Any]:
    """The largest of a profiled step's parts beside what they could take. step: the same as written; part_of: the part of a kernel by its name."""
    calls, rate = counted(step), copy_bandwidth(device)
    ceilings, rested = _both_ways(calls, device)
    moved: dict[str, int] = {}
    for name, count in calls.bytes.items():
        part = "optimizer" if "adam" in name or name.startswith("_foreach") else part_of(name)
        part = "copies and adds" if part in ("other", "products") else part
        moved[part] = moved.get(part, 0) + count
    for part, count in moved.items():
        if part not in ("products", "attention"):
            ceilings[part] = count / rate
    rows = [
        {"part": part, "ms": ms, "ceiling_ms": round(ceilings.get(part, 0.0), 2), "over": round(ms / ceilings[part], 3) if ceilings.get(part) else None,
         "of": "the same alone" if part in rested else "bytes at a copy's bandwidth"}
        | ({"rested_ms": round(rested[part], 2)} if part in rested else {})
        for part, ms in sorted(parts_ms.items(), key=lambda item: -item[1])[:LARGEST]
    ]  # fmt: skip
    return {
        "copy_tb_per_s": round(rate / 1e9, 3),
        "parts": rows,
        "bytes": dict(sorted(calls.bytes.items(), key=lambda item: -item[1])[:25]),
    }
