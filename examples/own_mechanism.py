"""A mechanism of your own: strided attention, tested by the contract and put into a model.

    python examples/own_mechanism.py

`farfield new NAME` writes a file of this form, with a decoding state, where the registry finds it.
"""

import torch

import farfield as ff
from farfield.mechanism import Case, Mechanism, Paper, Supports
from farfield.nn import Attention
from farfield.testing import contract


class Strided(Mechanism):
    """Each query block reads itself and every `stride`-th block before it.

        seen(i) = {j <= i : (floor(i / block) - floor(j / block)) mod stride = 0}
        out[i]  = sum over j in seen(i) of softmax_j(scale * q[i] . k[j]) v[j]

    T^2 / (2 stride) scores. Departs from the paper: blocks instead of single tokens, one pattern for all heads.
    """

    paper = Paper(
        title="Generating Long Sequences with Sparse Transformers",
        authors="Child, Gray, Radford, Sutskever",
        year=2019,
        arxiv="1904.10509",
    )
    cases = (Case(options={"block": 8, "stride": 3}, tokens=101, block=8),)
    supports = Supports(noncausal=False, decode=False)

    def __init__(self, *, block: int = 64, stride: int = 8, causal: bool = True, scale: float | None = None):
        super().__init__(causal=causal, scale=scale)
        self.block, self.stride = block, stride

    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        layout = self.layouts(q.shape[2], q.device)["tokens"]
        return ff.attend(q, ff.Rows(k, v), layout, scale=self.scale).out

    def reference(self, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        seen = (j <= i) & ((i // self.block - j // self.block) % self.stride == 0)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    def layouts(self, tokens: int, device: torch.device | None = None) -> dict[str, ff.Layout]:
        return {"tokens": ff.select.strided(tokens=tokens, stride=self.stride, block=self.block, device=device)}


def main(compiled=False):
    """Run the contract, torch.compile's part of it if asked for, and one layer."""
    case = Strided.cases[0]
    passed = 0
    for check in contract.CHECKS:
        if check is contract.check_compiles and not compiled:
            continue
        if reason := contract.why_not(check, Strided, case):
            print(f"left out  {check.__name__}: {reason}")
            continue
        check(Strided, case)
        passed += 1
    print(f"passed    {passed} checks")

    layer = Attention(64, heads=4, mechanism=Strided(block=16, stride=4))
    print("a layer  ", tuple(layer(torch.randn(2, 500, 64)).shape))
    return passed


if __name__ == "__main__":
    main()
