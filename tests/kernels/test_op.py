"""What `kernels.op.define` promises of every op, on one made for the test, and the gradient that the columns of a projection share."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.joint import JointGradient
from tests.kernels.scaled_op import scaled, scaled_op

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, shift, scale = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    return x, shift, scale


@pytest.mark.parametrize("shifted", [True, False])
def test_an_op_from_its_parts(shifted: bool) -> None:
    """Called as it is and by torch.compile: the reference's values and gradients, none for a tensor that is not given."""
    x, shift, scale = leaves()
    given, wanted = (x, shift if shifted else None, scale), [x, *([shift] if shifted else []), scale]
    torch.library.opcheck(scaled_op, (*given, 2.0), test_utils=CHECKS)
    y = x * scale * 2.0 + (shift if shifted else 0.0)
    d = torch.randn(2, 3)
    for call in (scaled, torch.compile(lambda *t: scaled(*t), backend="aot_eager", fullgraph=True)):
        out = call(*given, 2.0)
        torch.testing.assert_close(out, y)
        torch.testing.assert_close(torch.autograd.grad(out, wanted, d), torch.autograd.grad(y, wanted, d, retain_graph=True))


def test_an_op_is_differentiated_once() -> None:
    x, shift, scale = leaves()
    (dx,) = torch.autograd.grad(scaled(x, shift, scale, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_gradient_of_a_projection_in_one_piece() -> None:
    joint, x = JointGradient(6), torch.zeros(2, 3, 6)
    gate = joint.begin(x[..., 4:], 4).normal_()
    whole = joint.finish(x, ((0, 1, None), (4, 6, gate)))
    assert whole.data_ptr() + 4 * whole.element_size() == gate.data_ptr() and torch.equal(whole[..., 4:], gate)
    assert not whole[..., :1].any()


def test_a_gradient_begun_for_another_pass_is_left_alone() -> None:
    """The gate's gradient was asked for alone, and then that of the projection through something else."""
    joint, x = JointGradient(6), torch.zeros(2, 3, 6)
    asked = joint.begin(x[..., 4:], 4).fill_(1.0)
    other = torch.full((2, 3, 2), 2.0)
    whole = joint.finish(x, ((0, 4, torch.zeros(2, 3, 4)), (4, 6, other)))
    assert asked.eq(1.0).all() and torch.equal(whole[..., 4:], other)
    for like in (x.half(), x[:1]):  # another dtype or shape than was begun
        gate = joint.begin(x[..., 4:], 4).fill_(3.0)
        whole = joint.finish(like, ((4, 6, gate[: len(like)]),))
        assert whole.shape == like.shape and whole.dtype == like.dtype and whole[..., 4:].eq(3.0).all()


@pytest.mark.parametrize("names", list(itertools.combinations("xsw", 2)))
def test_gradients_nobody_asked_for(names: tuple[str, ...]) -> None:
    tensors = dict(zip("xsw", leaves()))
    frozen = {name: t if name in names else t.detach() for name, t in tensors.items()}
    gradients = torch.autograd.grad(scaled(*frozen.values(), 2.0).sum(), [frozen[name] for name in names])
    wanted = torch.autograd.grad((tensors["x"] * tensors["w"] * 2.0 + tensors["s"]).sum(), [tensors[name] for name in names])
    torch.testing.assert_close(gradients, wanted)
