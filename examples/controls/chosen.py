"""Blocks chosen by any score, and nothing in place of the others: what a choice alone costs.

    near(i)   = the last `near` tokens and the first `sinks`;    block m may be chosen if it lies before near(i)
    score     = an estimate of log(sum over the tokens j of block m of e^(x . k[j])),    x = scale * q[i]
    out[i]    = softmax attention over near(i), the blocks between, and the `picks` best blocks

A score is made of `detail` segments of a block, as the log of the sum of what e^score each has, with c tokens, the mean
k and the variance v of its keys, channel by channel:

    mean      log c + x . k
    normal    log c + x . k + x^2 . v / 2        the sum itself, were the keys normally distributed
    box       log c + x . centre + |x| . half    never less than the sum; of the least box around the keys
    peak      log c + x . k[j*]                  j* the key farthest from the mean
    mass      the sum itself: reads every key, and says what the best choice would be

A control, to be found by FARFIELD_MECHANISMS=examples/controls. Dense: causal, one whole sequence, no gradients.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from farfield.mechanism import Case, Mechanism, Paper, Supports, no_tokens

SCORES = ("mean", "normal", "box", "peak", "mass")
STEP = 512  # queries at a time


class Chosen(Mechanism):
    """The best far blocks of each query and head by a score.

    Args:
        block: tokens of a block.
        near, sinks: the last and the first tokens, which every query reads.
        picks: blocks that a query chooses at most.
        score: "mean", "normal", "box", "peak" or "mass".
        detail: segments of a block that are scored one by one; divides `block`.
        least: a block is not read if its share of the weight, by the scores of all blocks, is less.
    """

    paper = Paper(
        title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        authors="Tang et al.",
        year=2024,
        arxiv="2406.10774",
    )
    cases = (Case(options={"block": 8, "near": 16, "sinks": 3, "picks": 2, "score": "mean"}, tokens=101, block=8),)
    supports = Supports(noncausal=False, decode=False, training=False)

    def __init__(
        self,
        *,
        block: int = 16,
        near: int = 128,
        sinks: int = 4,
        picks: int = 32,
        score: str = "normal",
        detail: int = 1,
        least: float = 0.0,
        causal: bool = True,
        scale: float | None = None,
    ):
        super().__init__(causal=causal, scale=scale)
        if score not in SCORES:
            raise ValueError(f"chosen: score must be one of {', '.join(SCORES)}, got {score!r}")
        if min(block, detail, near) < 1 or block % detail or min(sinks, picks) < 0 or not 0 <= least < 1:
            raise ValueError(
                "chosen: near >= 1, sinks and picks >= 0, 0 <= least < 1, and detail must divide block, "
                f"got {block=}, {near=}, {sinks=}, {picks=}, {detail=}, {least=}"
            )
        self.block, self.near, self.sinks, self.picks = block, near, sinks, picks
        self.score, self.detail, self.least = score, detail, least
        self._read = 0, 0.0

    @torch.no_grad()
    def forward(self, q, k, v, *, group=None, rotary=None):
        self.check(q, k, v, group=group, rotary=rotary)
        tokens = q.shape[2]
        if not tokens:
            return no_tokens(q, v)
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        out, read = q.new_empty(*q.shape[:3], v.shape[3]), 0.0
        for start in range(0, tokens, STEP):
            here = slice(start, min(start + STEP, tokens))
            x = q[:, :, here].unflatten(1, (k.shape[1], -1)) * scale
            logits = x @ k[:, :, None, : here.stop].mT
            seen = self._seen(x, k[:, :, : here.stop], logits, start)
            read += float(seen.sum()) / (q.shape[0] * q.shape[1])
            weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
            out[:, :, here] = (weights @ v[:, :, None, : here.stop]).flatten(1, 2)
        self._read = tokens, read / tokens
        return out

    def rows_read(self, tokens: int) -> float | None:
        """What the last forward read, if it had as many tokens: it depends on the data."""
        return self._read[1] if self._read[0] == tokens else None

    def _seen(self, x: Tensor, k: Tensor, logits: Tensor, start: int) -> Tensor:
        """Which tokens each query reads, [B, G, H / G, t, S]."""
        rows = k.shape[2]
        i, j = torch.arange(start, start + x.shape[3], device=x.device)[:, None], torch.arange(rows, device=x.device)
        past = j <= i
        near = past & ((i - j < self.near) | (j < self.sinks))
        # blocks that end before the last `near` tokens; one that reaches into them is read as it is
        first = torch.arange(0, rows, self.block, device=x.device)
        far = first + self.block <= i - self.near + 1
        score = self._scores(x, k, logits.masked_fill(~past, float("-inf"))).masked_fill(~far, float("-inf"))
        if self.least:
            total = torch.logaddexp(score.logsumexp(-1), logits.masked_fill(~near, float("-inf")).logsumexp(-1))
            score = score.masked_fill(score < (total + math.log(self.least))[..., None], float("-inf"))
        best = score.topk(min(self.picks, len(first)), -1)
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best.indices, best.values > float("-inf"))
        chosen |= ~far & (first <= i - self.near)
        return near | (chosen.repeat_interleave(self.block, -1)[..., :rows] & past)

    def _scores(self, x: Tensor, k: Tensor, logits: Tensor) -> Tensor:
        """Of every block, [B, G, H / G, t, blocks]."""
        more, size = -k.shape[2] % self.block, self.block // self.detail
        if self.score == "mass":
            return pad(logits, (0, more), value=float("-inf")).unflatten(-1, (-1, self.block)).logsumexp(-1)
        # the last block may be incomplete; it is not far from any query
        keys = pad(k, (0, 0, 0, more)).unflatten(2, (-1, size))
        mean = keys.mean(3)
        found = x @ mean[:, :, None].mT
        if self.score == "normal":
            found = found + x.square() @ keys.var(3, correction=0)[:, :, None].mT / 2
        if self.score == "box":
            low, high = keys.amin(3), keys.amax(3)
            found = x @ ((low + high) / 2)[:, :, None].mT + x.abs() @ ((high - low) / 2)[:, :, None].mT
        if self.score == "peak":
            away = (keys - mean[:, :, :, None]).square().sum(-1).argmax(-1)
            at = away[..., None, None].expand(*away.shape, 1, keys.shape[-1])
            found = x @ keys.gather(3, at)[..., 0, :][:, :, None].mT
        return found.unflatten(-1, (-1, self.detail)).logsumexp(-1) + math.log(size)
