"""An op of a few lines for tests/kernels/test_op.py: x scale factor + shift. It has no kernels. (The annotations are its schema.)"""

from torch import Tensor

from kernels.op import define


def _forward(x: Tensor, shift: Tensor | None, scale: Tensor, factor: float) -> Tensor:
    y = x * scale * factor
    return y if shift is None else y + shift


def _backward(d: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor, factor: float) -> tuple[Tensor, Tensor | None, Tensor]:
    return d * scale * factor, None if shift is None else d, (d * x * factor).sum(0)


scaled, scaled_op = define("scaled_for_tests", _forward, lambda x, *_: x.new_empty(x.shape), _backward)
