"""FMA with open > 0 and score="mean", on a GPU by the search that the score "peak" has there.

What a choice by means is worth in training, at the speed of the other. The rows searched are the means of the keys,
rounded to the keys' dtype, where FMA itself keeps them in float32; where the kernels do not take a call it is FMA.
To be found by FARFIELD_MECHANISMS=examples/controls.
"""

import torch

from farfield.mechanisms.fma import FMA
from farfield.ops import opened as on_gpu


class MeanFMA(FMA):
    """FMA; options as FMA's, with score="mean"."""

    def _quickly(self, q, k, v, far, tree):
        self._check_opening()
        plan = self.plan()
        if self.score != "mean" or far.bias is None or on_gpu.refusal(q, k, v, tree, plan):
            return None
        from farfield.kernels import opened

        scale = q.shape[3] ** -0.5 if self.scale is None else float(self.scale)
        rows = means_of(k.detach(), tree, self.detail).to(k.dtype)
        chosen = opened.choose(
            q.detach(), rows, tree, plan.near, plan.detail, plan.picks, plan.beam, self.shared, scale, plan.hold
        )
        return on_gpu.attend(q, k, v, (far.k, far.v, far.bias), chosen, tree, plan, scale)


def means_of(k, tree, detail):
    """[B, G, R, D]: `detail` means of each group of each level of a causal tree without sinks, level by level."""
    level = k[:, :, : tree.blocks * tree.block].float().unflatten(2, (-1, tree.block // detail)).mean(3)
    found = []
    for groups in tree.groups:
        found.append(level[:, :, : groups * detail])
        # a group is put together from two; of an odd number the last has no partner
        level = level[:, :, : groups // 2 * 2 * detail].unflatten(2, (-1, 2)).mean(3)
    return torch.cat(found, 2)
