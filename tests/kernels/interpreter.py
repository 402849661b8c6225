"""A third of the time in Triton's interpreter. It computes nothing else: it finds once what the interpreter works out at each operation.

The interpreter replaces the functions of triton.language at every call of a jitted helper, though the call of the kernel around it has done
so, and makes the type of every small block anew, with its name, its sizes wrapped and checked. `python -m tests.kernels.interpreted` compares
a kernel's results with and without all this.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter

KNOWN = ("3.9.",)  # releases of Triton whose types and operations are as assumed below; any other runs its own


def patch_once() -> None:
    """Until the process ends; to be called before the first kernel."""
    language_once()
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # tensors on a CPU, which kernels wrote to themselves
    if triton.__version__.startswith(KNOWN):
        types_once()
        call_directly()
        usual_types_at_once()
        whole_rows()


def language_once() -> None:
    """Without effect on a Triton whose interpreter is built in another way."""
    if not (hasattr(interpreter, "_patch_lang") and hasattr(getattr(interpreter, "_LangPatchScope", None), "restore")):
        return
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[str] = set()
    seen: dict[int, tuple[dict[str, Any], set[str]]] = {}  # of the globals of a file: modules of the language among them

    def patch_lang(fn: Any) -> Any:
        scope = fn.__globals__
        if id(scope) not in seen:
            seen[id(scope)] = scope, {module.__name__ for module in scope.values() if module is tl or module is core}
        modules = seen[id(scope)][1]
        if modules and modules <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules)
        return patch(fn)

    def restore_all(scope: Any) -> None:
        patched.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_lang, restore_all


def types_once() -> None:
    """Equal block types share their sizes, names and checks; so do the tensors of a type; a type's numpy dtype is looked up by its name."""
    make_block, make_tensor, equal, numpy_dtype = (
        core.block_type.__init__,
        core.tensor.__init__,
        core.dtype.__eq__,
        interpreter._get_np_dtype,
    )
    blocks: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *(shape.values if type(shape) is core.tuple else shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = element_ty, dict(self.__dict__)  # the element type, too, so that no other gets its id
        self.__dict__.update(blocks[key][1])

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in shapes:
            make_tensor(self, handle, type)
            shapes[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, type, type.scalar, shapes[sizes]

    def dtype_equal(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    def get_np_dtype(dtype: Any) -> Any:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = numpy_dtype(dtype)
        return dtypes[dtype.name]

    core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__ = block_init, tensor_init, dtype_equal
    interpreter._get_np_dtype = get_np_dtype


def call_directly() -> None:
    """Of each function of the language: without the two wrappers that only hand on which semantics hold; looked for once."""
    wrapper = core.add.__code__
    functions: dict[int, list[tuple[str, Any]]] = {}  # of each module or class

    def direct(member: Any) -> Any:
        function, semantics = member.__wrapped__ if member.__code__ is wrapper else member, interpreter.interpreter_semantic

        def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
            return function(*args, _semantic=semantics, **kwargs)

        return call

    def patch_builtin(holder: Any, builder: Any, scope: Any) -> None:
        if id(holder) not in functions:
            functions[id(holder)] = [(name, direct(member)) for name, member in inspect.getmembers(holder) if core.is_builtin(member)]
        for name, call in functions[id(holder)]:
            scope.set_attr(holder, name, call)

    interpreter._patch_builtin = patch_builtin


def usual_types_at_once() -> None:
    """Two blocks of equal sizes need no broadcasting, two scalars neither; of one usual type both, an operation needs no common one. A number
    beside a block becomes the block that it was the last time."""
    broadcast, check_types = semantic.TritonSemantic.broadcast_impl_value, semantic.TritonSemantic.binary_op_type_checking_impl
    usual = {id(dtype) for dtype in (tl.float32, tl.int32, tl.int64)}
    constants: dict[tuple[Any, ...], Any] = {}

    def constant(tensor: Any, number: float, wanted: Any, words: tuple[Any, ...]) -> Any:
        """`number` as a tensor like `tensor`; None where that is not the type of the operation. `wanted` says so the first time."""
        key = (number.hex() if type(number) is float else number, id(tensor.dtype), id(tensor.shape), *words)
        if key not in constants:
            same, block = wanted()
            constants[key] = block if same is tensor else None
            block.handle.data.flags.writeable = False  # all share it
        return constants[key]

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    def binary_op_type_checking_impl(self: Any, lhs: Any, rhs: Any, *words: Any, **options: Any) -> Any:
        if type(lhs) is core.tensor and id(lhs.dtype) in usual:
            if type(rhs) is core.tensor and lhs.dtype is rhs.dtype:
                return self.broadcast_impl_value(lhs, rhs)
            if type(rhs) is float or type(rhs) is int:
                block = constant(lhs, rhs, lambda: check_types(self, lhs, rhs, *words, **options), words)
                if block is not None:
                    return lhs, block
        elif type(rhs) is core.tensor and id(rhs.dtype) in usual and (type(lhs) is float or type(lhs) is int):
            block = constant(rhs, lhs, lambda: check_types(self, lhs, rhs, *words, **options)[::-1], words)
            if block is not None:
                return block, rhs
        return check_types(self, lhs, rhs, *words, **options)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_impl_value
    semantic.TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl


def whole_rows() -> None:
    """Scans and reductions of blocks with further axes combine a row with the next at once; theirs is a call for each number."""
    scan, reduce = interpreter.ScanOps.generic_scan, interpreter.ReduceOps.generic_reduce

    def combined(self: Any, blocks: Any, axis: int) -> list[list[Any]]:
        """For each block, what has been combined up to each row of `axis`, as arrays."""
        arrays, total = [block.handle.data for block in blocks], None
        lines: list[list[Any]] = [[] for _ in arrays]
        for i in range(arrays[0].shape[axis]):
            row = tuple(self.to_tensor(array.take(i, axis), block.dtype) for array, block in zip(arrays, blocks))
            total = row if total is None else self.combine_fn.fn(*total, *row)
            total = total if isinstance(total, (tuple, core.tuple)) else (total,)
            for line, array, value in zip(lines, arrays, total):
                line.append(value.handle.data.astype(array.dtype))
        return lines

    def generic_scan(self: Any, blocks: Any) -> list[Any]:
        if blocks[0].handle.data.ndim < 2:
            return scan(self, blocks)
        lines = combined(self, blocks, self.axis)
        return [self.to_tensor(np.stack(line, self.axis), block.dtype) for line, block in zip(lines, blocks)]

    def generic_reduce(self: Any, blocks: Any) -> list[Any]:
        if self.axis is None or blocks[0].handle.data.ndim < 2:
            return reduce(self, blocks)
        totals = [line[-1] for line in combined(self, blocks, self.axis)]
        if self.keep_dims:
            totals = [np.expand_dims(total, self.axis) for total in totals]
        return [self.to_tensor(total, block.dtype) for total, block in zip(totals, blocks)]

    interpreter.ScanOps.generic_scan, interpreter.ReduceOps.generic_reduce = generic_scan, generic_reduce


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """x (1, 3, ...) in memory with 2^30 numbers between its steps, so that offsets of 32 bits do not reach the last one. Of what lies between nothing
    takes room, as nobody touches it."""
    steps = torch.empty((2 << 30) + x[0, 0].numel(), dtype=x.dtype).as_strided(
        x.shape, (3 << 30, 1 << 30, *x[:, :1].contiguous().stride()[2:])
    )
    return steps.copy_(x)


def sixteen_bits() -> None:
    """Products of bf16 operands, which the interpreter has not, and conversions that round to nearest, as a GPU's do."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def widened(x: Any) -> Any:
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        return interpreter.TensorHandle(np.matmul(widened(a), widened(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def rounded(self: Any, src: Any, dst: Any) -> Any:
        kinds = src.dtype.scalar, dst.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widened(src), tl.float32)
        if kinds != (tl.float32, tl.bfloat16):
            return cast(self, src, dst)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        near = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), near), tl.bfloat16)

    interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl = dot, rounded
