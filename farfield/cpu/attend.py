"""attend in batched PyTorch: a few query blocks of all heads at a time, every tile small enough for the cache.

A unit is one (batch, key head) with its query heads stacked in the query tile, or one (batch, query head) where lists
or biases differ by query head. One step takes the tiles of some units and query blocks; it reads its row blocks piece
by piece, a piece being some list entries of one source, under a running softmax. Nothing larger than a piece is ever
gathered.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from farfield.ops.attend import Call

# Scores of one step: 4 MB in float32. Smaller steps pay for dispatch, larger ones leave the caches of small machines.
STEP = 1 << 20


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, H, T, E] and lse [B, H, T]; the contract is ops.attend's."""
    geometry = _Geometry(call)
    queries = geometry.by_unit(call.q)
    out = geometry.empty_by_unit(call.v[0].shape[-1])
    lse = geometry.empty_by_unit(1)
    for step in geometry.steps():
        q_tile = step.tile(queries) * call.scale
        peak = torch.full_like(q_tile[..., :1], float("-inf"))
        base = mass = torch.zeros_like(peak)
        acc = q_tile.new_zeros(*q_tile.shape[:2], call.v[0].shape[-1])
        for piece in step.pieces():
            scores = piece.hide(torch.bmm(q_tile, piece.k.mT))
            higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
            # a query that has read nothing keeps peak = -inf, and -inf - -inf is nan
            base = higher.masked_fill(higher == float("-inf"), 0.0)
            weights = scores.sub_(base).exp_()
            fade = (peak - base).exp_()
            mass = mass * fade + weights.sum(-1, keepdim=True)
            acc = acc.mul_(fade).baddbmm_(weights, piece.v)
            peak = higher
        step.store(out, acc / mass.masked_fill(mass == 0, 1.0))
        step.store(lse, mass.log_() + base)
    return geometry.by_head(out, call.q.dtype), geometry.by_head(lse, geometry.dtype)[..., 0]


def backward(call: Call, d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, bias_grad: bool) -> list[Tensor]:
    """Gradients of q, each k, each v and each bias (empty without `bias_grad`): one pass over the same pieces.

    With p = exp(s - lse):  dv = p' dout,  ds = p (dout v' - delta),  delta = sum(dout out) - dlse.
    """
    geometry = _Geometry(call)
    delta = (d_out.to(geometry.dtype) * out).sum(-1) - d_lse
    # a query that read nothing, and one that only fills up a block, gets weights exp(s - inf) = 0
    shift = lse.masked_fill(lse == float("-inf"), float("inf"))
    queries, d_outs, deltas, shifts = (geometry.by_unit(x) for x in (call.q, d_out, delta[..., None], shift[..., None]))
    d_q = geometry.empty_by_unit(call.q.shape[-1])
    d_k, d_v = ([torch.zeros_like(x, dtype=geometry.dtype) for x in xs] for xs in (geometry.k, geometry.v))
    d_bias = [geometry.zeros_by_row(s) if bias_grad and b.numel() else None for s, b in enumerate(call.bias)]
    for step in geometry.steps():
        q_tile, d_tile = step.tile(queries) * call.scale, step.tile(d_outs)
        delta_tile, shift_tile = step.tile(deltas), step.tile(shifts, fill=float("inf"))
        d_q_tile = torch.zeros_like(q_tile)
        for piece in step.pieces():
            weights = piece.hide(torch.bmm(q_tile, piece.k.mT)).sub_(shift_tile).exp_()
            d_scores = torch.bmm(d_tile, piece.v.mT).sub_(delta_tile).mul_(weights)
            d_q_tile.baddbmm_(d_scores, piece.k)
            piece.add_to(d_k[piece.source], torch.bmm(d_scores.mT, q_tile))
            piece.add_to(d_v[piece.source], torch.bmm(weights.mT, d_tile))
            if (grad := d_bias[piece.source]) is not None:
                piece.add_to_rows(grad, d_scores.sum(1))
        step.store(d_q, d_q_tile * call.scale)
    return [
        geometry.by_head(d_q, call.q.dtype),
        *(geometry.from_blocks(d, x) for d, x in zip(d_k, call.k, strict=True)),
        *(geometry.from_blocks(d, x) for d, x in zip(d_v, call.v, strict=True)),
        *(geometry.from_rows(d, x) for d, x in zip(d_bias, call.bias, strict=True)),
    ]


class _Geometry:
    """The geometry that forward and backward share, and every source flattened to row blocks."""

    def __init__(self, call: Call):
        q, k, v, bias, end, row_group, position, group, index, count, plans, _ = call
        self.batch, self.heads, self.tokens, _ = q.shape
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.device = q.device
        kv_heads = k[0].shape[1]
        by_query_head = [*index, *(x for x in (position, group) if x.numel())]
        shared = (
            all(x.shape[1] == 1 for x in by_query_head)
            and all(x.numel() == 0 or x.shape[1] in (1, kv_heads) for x in bias)
            and all(x.shape[1] == kv_heads for x in k)
        )
        self.unit_heads = kv_heads if shared else self.heads
        self.units = self.batch * self.unit_heads
        self.stack = self.heads // self.unit_heads
        # one short block need not be filled up
        self.q_block = min(plans[0].q_block, max(self.tokens, 1))
        self.blocks = index[0].shape[2]
        self.plans, self.rows = plans, [x.shape[2] for x in k]
        self.k, self.v = ([_to_blocks(x, p.k_block) for x, p in zip(xs, plans, strict=True)] for xs in (k, v))
        self.base = [self._first_block(x, p.k_block) for x, p in zip(k, plans, strict=True)]
        self.index, self.count = ([self._per_unit(x) for x in xs] for xs in (index, count))
        self.longest = [x.amax(0).tolist() if x.numel() else [0] * self.blocks for x in self.count]
        self.bias, self.end, self.row_group = (
            [self._per_unit(x) if x.numel() else None for x in xs] for xs in (bias, end, row_group)
        )
        self.position = self._per_unit(position) if position.numel() else None
        self.group = self._per_unit(group) if group.numel() else None

    def steps(self) -> Iterator[_Step]:
        """All units and query blocks, so many at a time that the scores of a step fit the cache."""
        if not (self.units and self.tokens):
            return
        widest = [max(longest) * p.k_block for longest, p in zip(self.longest, self.plans, strict=True)]
        tiles = max(1, STEP // max(1, self.stack * self.q_block * sum(widest)))
        units = min(self.units, tiles)
        blocks = min(self.blocks, max(1, tiles // units))
        for u in range(0, self.units, units):
            for n in range(0, self.blocks, blocks):
                yield _Step(self, slice(u, min(u + units, self.units)), slice(n, min(n + blocks, self.blocks)))

    def by_unit(self, x: Tensor) -> Tensor:
        """[B, H, T, X] as [units, stack, T, X]."""
        return x.reshape(self.units, self.stack, self.tokens, x.shape[-1])

    def by_head(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[units, stack, T, X] as [B, H, T, X]."""
        return x.view(self.batch, self.heads, self.tokens, x.shape[-1]).to(dtype)

    def empty_by_unit(self, width: int) -> Tensor:
        return torch.empty(self.units, self.stack, self.tokens, width, dtype=self.dtype, device=self.device)

    def zeros_by_row(self, source: int) -> Tensor:
        """One number for each row block entry of each unit: where bias gradients are added up."""
        row_blocks = -(-self.rows[source] // self.plans[source].k_block)
        return torch.zeros(self.units * row_blocks, self.plans[source].k_block, dtype=self.dtype, device=self.device)

    def from_blocks(self, grad: Tensor, like: Tensor) -> Tensor:
        """[B * G * M, k_block, X] as [B, G, S, X]."""
        batch, heads, rows, width = like.shape
        if not grad.numel():
            return torch.zeros_like(like)
        return grad.view(batch, heads, -1, width)[:, :, :rows].to(like.dtype).contiguous()

    def from_rows(self, grad: Tensor | None, bias: Tensor) -> Tensor:
        """The bias gradient summed to the shape of the bias."""
        if grad is None or not grad.numel():
            return bias.new_zeros(bias.shape)
        grad = grad.view(self.batch, self.unit_heads, -1)[:, :, : bias.shape[-1]]
        heads = bias.shape[1]
        grad = grad.reshape(self.batch, heads, self.unit_heads // heads, -1).sum(2)
        return (grad.sum(0, keepdim=True) if bias.shape[0] == 1 else grad).to(bias.dtype)

    def _per_unit(self, x: Tensor) -> Tensor:
        """[1|B, heads, ...] as [1 or units, ...]."""
        if x.shape[0] == x.shape[1] == 1:
            return x[0]
        heads = self.unit_heads // x.shape[1]
        x = x[:, :, None].expand(self.batch, x.shape[1], heads, *x.shape[2:])
        return x.reshape(self.units, *x.shape[3:])

    def _first_block(self, k: Tensor, k_block: int) -> Tensor:
        """The first row block of each unit, [units]."""
        heads = k.shape[1]
        unit = torch.arange(self.units, device=self.device)
        head = unit // self.unit_heads * heads + unit % self.unit_heads // (self.unit_heads // heads)
        return head * -(-k.shape[2] // k_block)


class _Step:
    """The tiles of some units and query blocks."""

    def __init__(self, call: _Geometry, units: slice, blocks: slice):
        self.call, self.units, self.blocks = call, units, blocks
        self.shape = units.stop - units.start, blocks.stop - blocks.start
        first, size = blocks.start * call.q_block, self.shape[1] * call.q_block
        self.queries = slice(first, min(first + size, call.tokens))
        self.padding = size - (self.queries.stop - self.queries.start)

    def tile(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[units, stack, T, X] cut to [tiles, stack * q_block, X], the end of a short last block filled up."""
        x = x[self.units, :, self.queries].to(self.call.dtype)
        if self.padding:
            x = torch.nn.functional.pad(x, (0, 0, 0, self.padding), value=fill)
        units, blocks = self.shape
        x = x.reshape(units, self.call.stack, blocks, self.call.q_block, x.shape[-1])
        return x.transpose(1, 2).reshape(units * blocks, self.call.stack * self.call.q_block, x.shape[-1])

    def store(self, into: Tensor, tile: Tensor) -> None:
        """The opposite of `tile`."""
        units, blocks = self.shape
        tile = tile.view(units, blocks, self.call.stack, self.call.q_block, -1).transpose(1, 2)
        tile = tile.reshape(units, self.call.stack, blocks * self.call.q_block, -1)
        into[self.units, :, self.queries] = tile[:, :, : tile.shape[2] - self.padding]

    def pieces(self) -> Iterator[_Piece]:
        """The lists of every source, cut where a step of a single tile would grow too large."""
        call = self.call
        tile = self.shape[0] * self.shape[1] * call.stack * call.q_block
        for source, plan in enumerate(call.plans):
            longest = max(call.longest[source][self.blocks])
            picks = max(1, STEP // (tile * plan.k_block)) if self.shape == (1, 1) else longest
            for p in range(0, longest, max(picks, 1)):
                yield _Piece(self, source, slice(p, min(p + picks, longest)))

    def query_rows(self, x: Tensor) -> Tensor:
        """A number for each query, [1 or units, T] cut to [1 or units, blocks, q_block]."""
        x = (x[self.units] if x.shape[0] > 1 else x)[:, self.queries]
        if self.padding:
            x = torch.cat([x, x[:, -1:].expand(-1, self.padding)], 1)
        return x.view(x.shape[0], self.shape[1], self.call.q_block)

    def positions(self) -> Tensor:
        if self.call.position is not None:
            return self.query_rows(self.call.position)
        here = torch.arange(self.queries.start, self.queries.stop + self.padding, device=self.call.device)
        return here.view(1, self.shape[1], self.call.q_block)


class _Piece:
    """Some list entries of one source: the rows they name, gathered, and what hides them."""

    def __init__(self, step: _Step, source: int, picks: slice):
        call = step.call
        self.step, self.source, self.plan = step, source, call.plans[source]
        units = step.units if call.index[source].shape[0] > 1 else slice(None)
        # [1 or units, blocks, picks]; what stands behind the end of a list may be anything
        count = call.count[source][units, step.blocks, None]
        self.listed = torch.arange(picks.start, picks.stop, device=call.device) < count
        self.index = call.index[source][units, step.blocks, picks].long().masked_fill(~self.listed, 0)
        self.flat = (call.base[source][step.units, None, None] + self.index).expand(*step.shape, -1).flatten()
        self.rows = self.index.shape[-1] * self.plan.k_block
        tiles = step.shape[0] * step.shape[1]
        self.k, self.v = (
            x.index_select(0, self.flat).view(tiles, self.rows, -1).to(call.dtype)
            for x in (call.k[source], call.v[source])
        )

    def hide(self, scores: Tensor) -> Tensor:
        """Add the rows' bias and put -inf where a query does not see a row. In place."""
        call, plan, step = self.step.call, self.plan, self.step
        inside = torch.arange(plan.k_block, device=scores.device)
        # [1 or units, blocks, picks, k_block]
        row = self.index[..., None] * plan.k_block + inside
        there = self.listed[..., None] & (row < call.rows[self.source])
        view = scores.view(*step.shape, call.stack, call.q_block, self.rows)
        row = row.clamp_(max=call.rows[self.source] - 1).flatten(2)
        bias = self._of_rows(call.bias[self.source], row)
        if bias is not None:
            view.add_(bias[:, :, None, None])
        if not there.all():
            view.masked_fill_(~there.flatten(2)[:, :, None, None], float("-inf"))
        ends = self._of_rows(call.end[self.source], row)
        ends = row if ends is None else ends
        groups = self._of_rows(call.row_group[self.source], row)
        if plan.causal or plan.reach >= 0 or groups is not None:
            first, hidden = self._hidden(row, ends, groups)
            if hidden is not None:
                view[..., first:].masked_fill_(hidden[:, :, None], float("-inf"))
        return scores

    def _hidden(self, row: Tensor, end: Tensor, group: Tensor | None) -> tuple[int, Tensor | None]:
        """Which of the rows from `first` on each query must not see, [1 or units, blocks, q_block, rows - first]."""
        plan, position = self.plan, self.step.positions()
        first = 0
        if plan.causal and plan.reach < 0 and group is None:
            # most lists end with the one block that is not wholly past
            future = end > position.amin(-1, keepdim=True)
            late = future.flatten(0, 1).any(0).nonzero()
            if not len(late):
                return 0, None
            first = int(late[0])
        row, end, position = row[:, :, None, first:], end[:, :, None, first:], position[..., None]
        hidden = end > position if plan.causal else None
        if plan.reach >= 0:
            far = ((position - end).abs() >= plan.reach) & (row >= plan.sinks)
            hidden = far if hidden is None else hidden | far
        if group is not None and (asking := self.step.call.group) is not None:
            other = group[:, :, None] != self.step.query_rows(asking)[..., None]
            hidden = other if hidden is None else hidden | other
        return first, hidden

    def _of_rows(self, x: Tensor | None, row: Tensor) -> Tensor | None:
        """`x` [1 or units, S] at the rows of this piece, [1 or units, blocks, rows]."""
        if x is None:
            return None
        if x.shape[0] == 1:
            return x[0][row]
        x = x[self.step.units]
        return x.gather(1, row.expand(x.shape[0], -1, -1).flatten(1)).view(x.shape[0], *row.shape[1:])

    def add_to(self, grad: Tensor, tile: Tensor) -> None:
        """Add the gradient of this piece's rows to that of all row blocks."""
        grad.index_add_(0, self.flat, tile.view(self.flat.shape[0], -1))

    def add_to_rows(self, grad: Tensor, tile: Tensor) -> None:
        """Add one number a row to `zeros_by_row`."""
        units, blocks = self.step.shape
        at = torch.arange(self.step.units.start, self.step.units.stop, device=grad.device)
        at = at[:, None, None] * (grad.shape[0] // self.step.call.units) + self.index
        grad.index_add_(0, at.flatten(), tile.reshape(units * blocks * self.index.shape[-1], -1))


def _to_blocks(x: Tensor, k_block: int) -> Tensor:
    """[B, G, S, X] as [B * G * M, k_block * X], the end of a short last block filled with 0."""
    if short := -x.shape[2] % k_block:
        x = torch.nn.functional.pad(x, (0, 0, 0, short))
    return x.reshape(-1, k_block * x.shape[3])
