"""FMA with open > 0, attended densely: the same choice, the same rows, the same softmax.

On a CPU the lists of a query of its own cost more than all scores do, at a few thousand tokens. This subclass hides
what a query does not read instead of gathering what it reads, so that many settings can be compared on one machine,
and counts the rows that are read, where FMA tells the most that it can be. Causal, in one piece, without gradients.
To be found by FARFIELD_MECHANISMS=examples/controls.
"""

import inspect

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from farfield.mechanisms.fma import FMA
from farfield.select import opened
from farfield.select.static import radii

STEP = 1024  # queries at a time


_OPTIONS = inspect.signature(FMA).parameters.values()
_EXACT = inspect.Parameter("exact", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)


class DenseFMA(FMA):
    """FMA whose opened groups are read through a mask.

    Args:
        exact: a summary has the weight that its tokens have together, log(sum of e^logit), and still their mean value;
            a level_bias is not added to it.
        options: as FMA's.
    """

    __signature__ = inspect.Signature([*_OPTIONS, _EXACT])
    _read = 0, 0.0

    def __init__(self, *, exact: bool = False, **options):
        super().__init__(**options)
        self.exact = exact

    def _attend_opened(self, q, tokens, far, sketches, where, starts, first=0, *, asking, more=0, boxes=None):
        if first or boxes is not None or not self.causal or q.shape[0] != 1:
            raise NotImplementedError("fma-dense: one whole sequence, causal")
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        rows, bias = opened.told(self.score, sketches)
        asked = opened.asked(self.score, asking, scale, self._weight())
        sizes = [s.rows.shape[2] for s in sketches]
        radius = radii(self.near, self.block, len(starts))
        heads = q.shape[1]
        kv_heads = tokens.k.shape[1]
        stack = heads // kv_heads
        far_bias = torch.zeros(len(far), device=q.device) if far.bias is None else far.bias.reshape(-1, 1, 1, len(far))
        k, far_k, v, far_v = (x[0][:, None].expand(-1, stack, -1, -1) for x in (tokens.k, far.k, tokens.v, far.v))
        out, count = q.new_empty(1, heads, q.shape[2], v.shape[3]), 0.0
        for start in range(0, q.shape[2], STEP):
            stop = min(start + STEP, q.shape[2])
            at = torch.arange(start, stop, device=q.device)
            x = asked[0, :, start:stop].unflatten(0, (kv_heads, stack))
            kept = self._kept(x, rows[0], bias.reshape(-1), at // self.block, sizes, radius)

            blocks = -(-stop // self.block)
            opens = kept[0][..., :blocks]
            opens = pad(opens, (0, blocks - opens.shape[-1]))
            each = torch.arange(stop, device=q.device)
            near = (at // self.block)[:, None] - each[:blocks] <= radius[0]
            seen = (opens | near).repeat_interleave(self.block, -1)[..., :stop]
            seen = (seen | (each < self.sinks)) & (each <= at[:, None])
            summaries = seen.new_zeros(*seen.shape[:3], len(far))
            holds = kept[0]
            for height, size in enumerate(sizes):
                above = pad(holds, (0, holds.shape[-1] % 2)).unflatten(-1, (-1, 2)).any(-1)
                rest = _listed(at // self.block, height, size, radius, above) & ~holds
                begin = starts[height] * self.rank
                summaries[..., begin : begin + size * self.rank] = rest.repeat_interleave(self.rank, -1)
                holds = above[..., : sizes[height + 1]] if height + 1 < len(sizes) else above

            read = torch.cat([seen, summaries], -1)
            count += float(read.sum()) / (read.shape[0] * read.shape[1])
            hidden = torch.zeros(kv_heads, stack, *read.shape[2:], device=q.device)
            hidden[..., stop:] = far_bias
            if self.exact:
                asking = q[0, :, start:stop].unflatten(0, (kv_heads, stack)) * scale
                sums = self._sums(asking @ k[:, :, :stop].mT, starts, sizes, len(far))
                hidden[..., stop:] = sums - asking @ far_k.mT
            hidden.masked_fill_(~read, float("-inf"))
            rows_k, rows_v = (torch.cat([x[:, :, :stop], y], 2) for x, y in ((k, far_k), (v, far_v)))
            mine = q[0, :, start:stop].unflatten(0, (kv_heads, stack))
            found = scaled_dot_product_attention(mine, rows_k, rows_v, hidden, scale=scale)
            out[0, :, start:stop] = found.flatten(0, 1)
        self._read = q.shape[2], count / q.shape[2]
        return out, None

    def _sums(self, logits, starts, sizes, rows):
        """Of each row of the far buffer log(sum of e^logit) over its tokens; of a future one anything."""
        found = logits.new_zeros(*logits.shape[:3], rows)
        logits = logits.masked_fill(torch.arange(logits.shape[3], device=logits.device) < self.sinks, float("-inf"))
        for height, (start, groups) in enumerate(zip(starts, sizes, strict=True)):
            first, many, width = start * self.rank, groups * self.rank, (self.block << height) // self.rank
            own = pad(logits, (0, max(many * width - logits.shape[3], 0)), value=float("-inf"))
            found[..., first : first + many] = own[..., : many * width].unflatten(-1, (many, width)).logsumexp(-1)
        return found

    def rows_read(self, tokens: int) -> float:
        """What the last forward read, if it had as many tokens; otherwise the most that it can be, as FMA has it."""
        return self._read[1] if self._read[0] == tokens else super().rows_read(tokens)

    def _kept(self, x, rows, bias, n, sizes, radius):
        """Which groups of each level are kept on the way down: of level 1 the opened ones.

        [G, 1, t, groups] where the heads of a key head share the choice, [G, H / G, t, groups] where each has its own.
        """
        beam = 2 * self.open if self.beam is None else self.beam
        kept, above = [], None
        for height in reversed(range(len(sizes))):
            part = slice(sum(sizes[:height]) * self.detail, sum(sizes[: height + 1]) * self.detail)
            score = (x @ rows[:, None, part].mT + bias[part]).unflatten(-1, (-1, self.detail))
            score = score.logsumexp(-1) if self.segments == "sum" else score.amax(-1)
            seen = _listed(n, height, sizes[height], radius, above)
            score = score.masked_fill(~seen, float("-inf"))
            if self.shared and x.shape[1] > 1:
                score = score.log_softmax(-1).logsumexp(1, keepdim=True).nan_to_num(nan=float("-inf"))
            above, most = score > float("-inf"), beam if height else self.open
            if most < sizes[height]:
                above &= torch.zeros_like(above).scatter_(-1, score.topk(most, -1).indices, True)
            kept.insert(0, above)
        return kept


def _listed(n, height, groups, radius, above):
    """Groups of a level that are no neighbours of block n's, and whose parents are, or are kept: [(G, s,) t, N]."""
    own, j = (n >> height)[:, None], torch.arange(groups, device=n.device)
    inside = (own // 2 - j // 2) <= radius[height + 1]
    if above is not None:
        # a group's parent may be incomplete, and missing
        children = above.repeat_interleave(2, -1)[..., :groups]
        inside = inside | pad(children, (0, groups - children.shape[-1]))
    return inside & (own - j > radius[height])
