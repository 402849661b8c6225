"""A tanh for FlashRNN's Triton kernels: theirs of the adjoint takes an exponential of bf16, which Triton no longer has. Imported by scripts.bench.dense_peers."""

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def tanh_in_fp32(x):
    return 2.0 * tl.sigmoid(2.0 * x.to(tl.float32)) - 1.0
