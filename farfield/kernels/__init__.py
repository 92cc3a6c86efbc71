"""The operations as Triton kernels. Reached from farfield.ops only, when CUDA tensors arrive."""
