"""The operations in batched PyTorch: any device, any dtype. Reached from farfield.ops only."""
