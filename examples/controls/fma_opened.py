"""FMA with open > 0 by the GPU's kernels and nothing else, the groups chosen by peaks or by means.

What the score of a choice is worth in training, at one speed. The means that are searched are rounded to the keys'
dtype, where FMA(score="mean") keeps them in float32. What the kernels do not take is refused where FMA takes a longer
way, which a training run cannot afford. Off the GPU it is FMA. To be found by FARFIELD_MECHANISMS=examples/controls.
"""

import torch

from farfield.mechanism import Supports
from farfield.mechanisms.fma import FMA
from farfield.ops import opened as on_gpu


class OpenedFMA(FMA):
    """FMA; options as FMA's, with score "peak" or "mean"."""

    supports = Supports(packed=False, rotary=True, decode=False)

    def _quickly(self, q, k, v, far, tree):
        self._check_opening()
        if not q.is_cuda:
            return None
        if self.score not in ("peak", "mean"):
            raise NotImplementedError(f"fma-opened: score must be peak or mean on a GPU, got {self.score!r}")
        if self.segments != "best":
            raise NotImplementedError(f"fma-opened: segments must be 'best' on a GPU, got {self.segments!r}")
        plan = self.plan()
        if why := on_gpu.refusal(q, k, v, tree, plan):
            raise NotImplementedError(f"fma-opened: on a GPU it {why}")
        from farfield.kernels import opened

        scale = q.shape[3] ** -0.5 if self.scale is None else float(self.scale)
        keys = k.detach()
        if self.score == "peak":
            rows = opened.peaks_of(keys, tree, self.detail)
        else:
            rows = means_of(keys, tree, self.detail).to(k.dtype)
        chosen = opened.choose(
            q.detach(), rows, tree, plan.near, plan.detail, plan.picks, plan.beam, self.shared, scale, plan.hold
        )
        return on_gpu.attend(q, k, v, (far.k, far.v, far.bias), chosen, tree, plan, scale)

    def extend(self, q, k, v, state=None, *, rotary=None):
        raise NotImplementedError("fma-opened: for training and scoring; decode with FMA")


def means_of(k, tree, detail):
    """[B, G, R, D]: `detail` means of each group of each level of a causal tree without sinks, level by level."""
    level = k[:, :, : tree.blocks * tree.block].float().unflatten(2, (-1, tree.block // detail)).mean(3)
    found = []
    for groups in tree.groups:
        found.append(level[:, :, : groups * detail])
        # a group is put together from two; of an odd number the last has no partner
        level = level[:, :, : groups // 2 * 2 * detail].unflatten(2, (-1, 2)).mean(3)
    return torch.cat(found, 2)
