"""The loss by Triton kernels."""
