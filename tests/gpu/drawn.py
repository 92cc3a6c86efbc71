"""Random numbers on the GPU that bfloat16 holds exactly, so that every dtype starts from the same ones."""

import torch


def draw(*shape, dtype=torch.bfloat16, seed=0):
    gen = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=gen, device="cuda").bfloat16().to(dtype)


def qkv(tokens, *, batch=1, heads=4, kv_heads=2, width=64, dtype=torch.bfloat16):
    """q, k, v as leaves that require gradients."""
    shapes = ((batch, h, tokens, width) for h in (heads, kv_heads, kv_heads))
    return [draw(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
