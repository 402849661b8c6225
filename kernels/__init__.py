"""Operations with a plain torch reference and, where it pays, Triton kernels."""
