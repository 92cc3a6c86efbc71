"""Decode with a state: prefill in chunks, token by token, a draft that is taken back, and what it all weighs.

python examples/decode.py --tokens 4096
"""

import argparse

import torch

import farfield as ff


@torch.no_grad()
def main(tokens=4096, new=32, chunk=1000):
    torch.manual_seed(0)
    heads, width = 4, 32
    fma = ff.FMA(block=64, near=128, rank=16, rewind=8)
    q, k, v = (torch.randn(1, heads, tokens + new, width) for _ in range(3))

    # the prompt, in chunks of any size
    state = None
    for start in range(0, tokens, chunk):
        at = slice(start, min(start + chunk, tokens))
        out, state = fma.extend(q[:, :, at], k[:, :, at], v[:, :, at], state)

    # a draft of five tokens, of which two are accepted; the other way is to keep the state from before it
    at = slice(tokens, tokens + 5)
    _, drafted = fma.extend(q[:, :, at], k[:, :, at], v[:, :, at], state)
    state = drafted.crop(3)

    # token by token
    for t in range(tokens + 2, tokens + new):
        at = slice(t, t + 1)
        out, state = fma.extend(q[:, :, at], k[:, :, at], v[:, :, at], state)

    whole = fma(q, k, v)[:, :, -1:]
    print(
        f"{state.tokens:,} tokens: {state.rows} rows, {state.nbytes:,} bytes of {k.nbytes + v.nbytes:,} of all k and v"
    )
    print(f"largest difference from one forward: {(out - whole).abs().max():.1e}")
    return out, whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    main(parser.parse_args().tokens)
