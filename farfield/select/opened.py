"""Opened groups: some far groups are read token by token instead of as their summaries, each query's own choice.

A far group hides what its tokens say one by one. Each query scores groups on the way down the tree, keeps the best of
each level, and opens the best of level 1 at the end: those are read as their tokens. A group that holds an opened one
and is far itself is replaced by its children, so that every (query, token) pair is still covered exactly once.

What a group could hide is told by its sketch: a few rows, each for a segment of it, made up the tree as summaries
are. With x the scaled query and over the tokens j of a segment,

    box     sum_c max(x_c min_j k[j]_c, x_c max_j k[j]_c)   >= every x . k[j]; as centre and half-range of the box
                                                              it is x . centre + |x| . half
    ball    x . mean + |x|_2 radius                         >= every x . k[j]; the radius is that of the mean's ball
    peak    x . k[j*]                                       j* the key farthest from the mean, the first of several
    mean    x . mean                                        what the summary itself says
    learned x . mean + sum_c w_c x_c^2 var_c                w [G, D] starts at 1/2: the mean of e^(x . k) over keys of
                                                              these means and variances, if they are normal

(the radius of a group of groups is the least that covers their balls, its j* that of its two which is farther away),
each + log(tokens of the segment). A group scores what its best segment scores, or what they all do, summed as the
softmax would sum them: log(sum of e^score). The box depends on the axes: with rotated keys it is that of the rotated
ones, and the choice changes with a shift of all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.library import custom_op

from farfield.ops import precision
from farfield.ops.attend import attend
from farfield.ops.eager import eager
from farfield.ops.merge import merge
from farfield.select.static import far_lists, near_lists, pack_lists
from farfield.types import Layout, Partial, Rows

SCORES = ("box", "ball", "peak", "mean", "learned")

LISTS = 1 << 28  # bytes of lists at once: one list for each query is long where the lists of blocks are short
_STEP = 1 << 22  # numbers of sketches gathered at once
_UNUSED = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Sketch:
    """One level's groups, `detail` rows each.

    Args:
        rows: of box the least and the largest key, of ball the mean and the radius, of peak the mean and the key
            farthest from it, of mean the mean, of learned mean and variance; float32 or wider, 0 for a row without
            tokens.
        count: how many tokens a row stands for.
    """

    rows: Float[Tensor, "B G N d X"]
    count: Float[Tensor, "#B 1 N d"]


class Opening(NamedTuple):
    """How a choice is made; integers only, so that a custom op can carry it.

    Args:
        picks: how many groups of level 1 a query opens, fewer where there are fewer.
        beam: how many groups of each further level it looks into.
        shared: the query heads of a key head choose together, by the sum of the shares that each would give to the
            candidates of a level; otherwise each for itself.
        detail: rows of a group's sketch.
        sink_groups: how many far groups hold the sinks of a document; a query that opens block 0 does not read them.
        causal: whether only the past is read.
        summed: a group scores the sum of its segments, otherwise the best of them.
    """

    picks: int
    beam: int
    shared: bool
    detail: int
    sink_groups: int
    causal: bool
    summed: bool = False


class Where(NamedTuple):
    """Each query's place: its block `n` of the `blocks` blocks of its document, which starts at block `start` and is
    the `document`-th; a query of no document has n = -1 and blocks = 0.
    """

    n: Int[Tensor, "#B T"]
    blocks: Int[Tensor, "#B T"]
    start: Int[Tensor, "#B T"]
    document: Int[Tensor, "#B T"]


def place(first: int, stop: int, block: int, device: torch.device) -> Where:
    """Queries first .. stop - 1 of a sequence of `stop` tokens, a single document."""
    n = torch.arange(first, stop, device=device)[None] // block
    zero = torch.zeros_like(n)
    return Where(n, zero + -(-stop // block), zero, zero)


def sketch(
    score: str,
    keys: Float[Tensor, "B G N m D"],
    present: Bool[Tensor, "#B N m"] | None,
    detail: int,
    *,
    levels: int | None = None,
    complete: bool = True,
    below: Sequence[Sketch] = (),
) -> list[Sketch]:
    """Further groups of every level: of the new blocks of tokens, and of the groups they complete with those `below`.

    Args:
        keys: the new blocks, as they will be read.
        present: which of their tokens there are; None: all.
        levels: how many. Default: as many as have groups.
        complete: only groups of two children; otherwise the last of a level may have one.
        below: all groups of each level that there are already, block 0 first.
    """
    keys = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    new = _leaf(score, keys, present, detail)
    found = []
    while (new.rows.shape[2] or len(found) < len(below)) if levels is None else len(found) < levels:
        height = len(found)
        found.append(new)
        done = below[height + 1].rows.shape[2] if height + 1 < len(below) else 0
        children = joined(cut(below[height], 2 * done), new) if height < len(below) else new
        many = children.rows.shape[2]
        if many % 2 and complete:
            children = cut(children, 0, many - 1)
        elif many % 2:
            rows = torch.nn.functional.pad(children.rows, (0, 0, 0, 0, 0, 1))
            children = Sketch(rows, torch.nn.functional.pad(children.count, (0, 0, 0, 1)))
        new = parents(score, children, detail)
    return found


def width_of(score: str, width: int) -> int:
    """Numbers in a row of a sketch of keys of such a width."""
    return {"mean": width, "ball": width + 1}.get(score, 2 * width)


def cut(level: Sketch, start: int | None = None, stop: int | None = None) -> Sketch:
    return Sketch(level.rows[:, :, start:stop], level.count[:, :, start:stop])


def joined(old: Sketch, new: Sketch) -> Sketch:
    """The groups of `old`, then those of `new`."""
    batch = max(old.count.shape[0], new.count.shape[0])
    counts = (x.count.expand(batch, -1, -1, -1) for x in (old, new))
    return Sketch(torch.cat([old.rows, new.rows], 2), torch.cat(list(counts), 2))


def _leaf(score: str, keys: Tensor, present: Tensor | None, detail: int) -> Sketch:
    """Level 1: a token is a segment of its own kind, and a block is put together from its tokens."""
    blocks, m, width = keys.shape[2:]
    count = keys.new_ones(1, 1, blocks, m) if present is None else present[:, None].to(keys.dtype)
    if present is not None:
        keys = keys.masked_fill(~present[:, None, ..., None], 0.0)
    parts = {"box": [keys, keys], "peak": [keys, keys], "mean": [keys], "ball": [keys, torch.zeros_like(keys[..., :1])]}
    parts["learned"] = [keys, torch.zeros_like(keys)]
    return _put_together(score, torch.cat(parts[score], -1), count, detail, width)


def parents(score: str, children: Sketch, detail: int) -> Sketch:
    """Groups 2n and 2n + 1 put together; their rows stand for segments of their own."""
    rows, count = (x.unflatten(2, (-1, 2)).flatten(3, 4) for x in (children.rows, children.count))
    size = rows.shape[-1]
    width = {"mean": size, "ball": size - 1}.get(score, size // 2)
    return _put_together(score, rows, count, detail, width)


def _put_together(score: str, rows: Tensor, count: Tensor, detail: int, width: int) -> Sketch:
    """[B, G, N, x, X] as [B, G, N, detail, X]: x / detail rows each become one."""
    rows, count = rows.unflatten(3, (detail, -1)), count.unflatten(3, (detail, -1))
    there, total = count[..., None] > 0, count.sum(-1)
    first, second = rows[..., :width], rows[..., width:]
    if score == "box":
        low = first.masked_fill(~there, float("inf")).amin(4)
        high = second.masked_fill(~there, float("-inf")).amax(4)
        found = torch.cat([low, high], -1)
    else:
        share = count / total.masked_fill(total == 0, 1.0)[..., None]
        mean = (first * share[..., None]).sum(4)
        found = mean
        if score == "ball":
            radius = (first - mean[..., None, :]).norm(dim=-1, keepdim=True) + second
            found = torch.cat([mean, radius.masked_fill(~there, 0.0).amax(4)], -1)
        if score == "learned":
            spread = second + (first - mean[..., None, :]).square()
            found = torch.cat([mean, (spread * share[..., None]).sum(4)], -1)
        if score == "peak":
            away = (second - mean[..., None, :]).square().sum(-1).masked_fill(~there[..., 0], -1.0)
            # the first of several as far: of two tokens rounding would choose
            best = (away >= 0.9999 * away.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)
            best = best[..., None, None].expand(*best.shape, 1, width)
            found = torch.cat([mean, second.gather(4, best)[..., 0, :]], -1)
    return Sketch(found.masked_fill((total == 0)[..., None], 0.0), total)


def asked(
    score: str, q: Float[Tensor, "B H T D"], scale: float, weight: Float[Tensor, "G D"] | None = None
) -> Float[Tensor, "B H T F"]:
    """What a query's product with `told` makes the score, float32 or wider; a gradient for the weight only."""
    x = q.detach().to(torch.promote_types(q.dtype, torch.float32)) * scale
    if weight is not None:
        each = weight.to(x.dtype).repeat_interleave(q.shape[1] // weight.shape[0], 0)[:, None]
        return torch.cat([x, each * x.square()], -1)
    if score == "box":
        return torch.cat([x, x.abs()], -1)
    return torch.cat([x, x.norm(dim=-1, keepdim=True)], -1) if score == "ball" else x


def told(score: str, levels: Sequence[Sketch]) -> tuple[Float[Tensor, "B G R F"], Float[Tensor, "#B 1 R"]]:
    """All levels' sketches in one buffer, and the logs of their rows' counts."""
    rows = torch.cat([x.rows.flatten(2, 3) for x in levels], 2)
    batch = max(x.count.shape[0] for x in levels)
    count = torch.cat([x.count.flatten(2).expand(batch, -1, -1) for x in levels], 2)
    return told_rows(score, rows), count.log()


def told_rows(score: str, rows: Float[Tensor, "B G R X"]) -> Float[Tensor, "B G R F"]:
    """Rows of sketches as `told` has them."""
    if score == "box":
        low, high = rows.chunk(2, -1)
        return torch.cat([low + high, high - low], -1) / 2
    return rows.chunk(2, -1)[1] if score == "peak" else rows


def score_loss(
    q: Float[Tensor, "B H t D"],
    k: Float[Tensor, "B G S D"],
    at: Int[Tensor, " t"],
    weight: Float[Tensor, "G D"],
    sketches: Sequence[Sketch],
    *,
    block: int,
    radius: Sequence[int],
    lead: int,
    scale: float,
    summed: bool = False,
) -> Float[Tensor, ""]:
    """The divergence of the groups' shares by the learned score from their shares of exact attention, in nats.

    KL(shares of the past far groups of a level by their tokens || by score), on average over the queries at positions
    `at`, heads, and those levels that have two such groups or more. The first `lead` tokens are in no group;
    `summed` as in Opening. Gradients go to the weight alone.
    """
    # float32 or wider, under autocast too
    with precision.kept(q):
        return _score_loss(q, k, at, weight, sketches, block, radius, lead, scale, summed)


def _score_loss(
    q: Tensor, k: Tensor, at: Tensor, weight: Tensor, sketches: Sequence[Sketch], block: int, radius: Sequence[int],
    lead: int, scale: float, summed: bool,
) -> Tensor:  # fmt: skip
    x, exact = asked("learned", q, scale, weight), asked("mean", q, scale)
    repeat, tokens = q.shape[1] // k.shape[1], k.shape[2]
    exact = exact @ k.detach().to(exact.dtype).repeat_interleave(repeat, 1).mT
    exact = exact.masked_fill(torch.arange(tokens, device=k.device) < lead, float("-inf"))
    total, many = x.sum() * 0, at.new_zeros(())
    # the first block that is read at all
    top = len(radius) - 1
    nearest = (at // (block << top) - radius[top]).clamp(min=0) << top
    for height, level in enumerate(sketches):
        width, groups = block << height, level.rows.shape[2]
        own = torch.nn.functional.pad(exact, (0, groups * width - tokens), value=float("-inf"))
        own = own.unflatten(-1, (groups, width)).logsumexp(-1)
        rows, bias = told("learned", [level])
        score = (x @ rows.repeat_interleave(repeat, 1).mT + bias[:, :, None]).unflatten(-1, (groups, -1))
        score = score.logsumexp(-1) if summed else score.amax(-1)
        number = torch.arange(groups, device=k.device)
        far = (number < (at // width - radius[height])[:, None]) & (number >= nearest[:, None] >> height)
        far = far & (level.count.sum(-1) > 0)[:, :, None]
        far = far & (far.sum(-1, keepdim=True) > 1)
        share, guess = (y.masked_fill(~far, float("-inf")).log_softmax(-1) for y in (own, score))
        apart = share.exp() * (share - guess)
        total = total + apart.masked_fill(~far, 0.0).sum(-1).mean((0, 1)).sum()
        many = many + far.any(-1).sum() // far.shape[0]
    return total / many.clamp(min=1)


def opened_lists(
    x: Float[Tensor, "B H T F"],
    rows: Float[Tensor, "B G R F"],
    bias: Float[Tensor, "#B 1 R"],
    where: Where,
    opening: Opening,
    *,
    radius: Sequence[int],
    groups: Sequence[int],
    starts: Sequence[int],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The near and far lists of each query, each as index [B, G or H, T, P] and count.

    From the coarsest level down, the candidates are the groups of the far list and the children of those kept one
    level above; the best `beam` are kept, of level 1 the best `picks` opened, of two equal scores the lower number.
    O(beam log n) scores a query.

    Args:
        x, rows, bias: `asked` and `told`.
        radius: `radii(...)`, one more than there are levels.
        groups: how many groups of each level `rows` holds.
        starts: per level, what to add to a group's number to find it among the far groups.
    """
    run = _lists if eager(x, rows) else _op
    near, near_count, far, far_count = run(
        x, rows, bias, *where, [int(n) for n in opening], list(radius), list(groups), list(starts)
    )
    return (near, near_count), (far, far_count)


def _plan(numbers: Sequence[int]) -> Opening:
    picks, beam, shared, detail, sink_groups, causal, summed = numbers
    return Opening(picks, beam, bool(shared), detail, sink_groups, bool(causal), bool(summed))


def _widths(opening: Opening, radius: Sequence[int], groups: Sequence[int]) -> tuple[int, int]:
    """The longest near and far list that there can be."""
    sides = 1 if opening.causal else 2
    near = sides * radius[0] + 1 + min(opening.picks, groups[0])
    far = opening.sink_groups
    for height in range(len(groups)):
        far += sides * (2 * radius[height + 1] - radius[height] + 1)
        # of the children of an opened group one at least is opened
        far += min(opening.picks, groups[height + 1]) if height + 1 < len(groups) else 0
    return near, far


def _lists(
    x: Tensor, rows: Tensor, bias: Tensor, n: Tensor, blocks: Tensor, start: Tensor, document: Tensor,
    opening: Sequence[int], radius: Sequence[int], groups: Sequence[int], starts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = _plan(opening)
    batch, heads, tokens, _ = x.shape
    lists = rows.shape[1] if plan.shared else heads
    widths = _widths(plan, radius, groups)
    found = []
    for width in widths:
        shape = batch, lists, tokens
        found += [x.new_empty(*shape, width, dtype=torch.int32), x.new_empty(shape, dtype=torch.int32)]
    most = max(batch * heads * (2 * plan.beam + 8) * plan.detail * x.shape[3], 1)
    step = max(1, _STEP // most)
    # under autocast the products would be rounded
    with precision.kept(x):
        for first in range(0, tokens, step):
            cut = slice(first, min(first + step, tokens))
            where = Where(*(y[:, cut] for y in (n, blocks, start, document)))
            parts = _choose(x[:, :, cut], rows, bias, where, plan, radius, groups, starts)
            for whole, part in zip(found, parts, strict=True):
                if part.dim() == 4:
                    part = torch.nn.functional.pad(part, (0, max(whole.shape[3] - part.shape[3], 0)))
                    part = part[..., : whole.shape[3]]
                whole[:, :, cut] = part
    near, near_count, far, far_count = found
    return near, near_count, far, far_count


# One opaque op: traced, this is a few hundred small kernels for a compiler to chew on, in every layer.
@custom_op("farfield::opened_lists", mutates_args=())
def _op(
    x: Tensor, rows: Tensor, bias: Tensor, n: Tensor, blocks: Tensor, start: Tensor, document: Tensor,
    opening: Sequence[int], radius: Sequence[int], groups: Sequence[int], starts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _lists(x, rows, bias, n, blocks, start, document, opening, radius, groups, starts)


@_op.register_fake
def _(x, rows, bias, n, blocks, start, document, opening, radius, groups, starts):
    plan = _plan(opening)
    shape = x.shape[0], rows.shape[1] if plan.shared else x.shape[1], x.shape[2]
    near, far = _widths(plan, radius, groups)
    shapes = (*shape, near), shape, (*shape, far), shape
    return tuple(x.new_empty(s, dtype=torch.int32) for s in shapes)


def _choose(
    x: Tensor, rows: Tensor, bias: Tensor, where: Where, plan: Opening, radius: Sequence[int], groups: Sequence[int],
    starts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The lists of some queries."""
    batch, heads, tokens, _ = x.shape
    lists = rows.shape[1] if plan.shared else heads
    # [1|B, 1, t]
    n, blocks, start, document = (y[:, None] for y in where)
    slots, used = far_lists(n, radius, plan.causal, blocks)
    shape = batch, lists, tokens
    slots, used = ([y.expand(*shape, -1) for y in ys] for ys in (slots, used))
    exists = [(blocks[..., None] + 2**height - 1) >> height for height in range(len(groups))]
    before = [sum(groups[:height]) for height in range(len(groups))]

    kept = here = None
    for height in reversed(range(len(groups))):
        listed, there = slots[height], used[height]
        if kept is not None and here is not None:
            children = (2 * kept[..., None] + torch.arange(2, device=x.device)).flatten(-2)
            listed = torch.cat([listed, children], -1)
            there = torch.cat([there, here.repeat_interleave(2, -1) & (children < exists[height])], -1)
        listed = listed.masked_fill(~there, _UNUSED).sort(-1).values
        there = listed != _UNUSED
        listed = listed.masked_fill(~there, 0)
        at = listed + (start >> height)[..., None] + before[height]
        score = _scores(x, rows, bias, at, there, plan)
        # stable: of two equal scores the lower group stands first
        best = score.sort(dim=-1, descending=True, stable=True)
        most = plan.beam if height else plan.picks
        kept, here = listed.gather(-1, best.indices[..., :most]), best.values[..., :most] > float("-inf")
    # there is a level
    assert kept is not None
    assert here is not None

    leaves = kept.masked_fill(~here, _UNUSED).sort(-1).values
    here = leaves != _UNUSED
    local, exist = near_lists(n, radius[0], plan.causal, blocks)
    listed = torch.cat([local.expand(*shape, -1), leaves.masked_fill(~here, 0)], -1)
    near = pack_lists(listed + start[..., None], torch.cat([exist.expand(*shape, -1), here], -1))

    sinks = torch.arange(plan.sink_groups, device=x.device) + document[..., None] * plan.sink_groups
    # block 0 holds them, if it is opened
    closed = (n > radius[0]) & ~((leaves == 0) & here).any(-1)
    listed, there = [sinks.expand(*shape, -1)], [closed[..., None].expand(*shape, sinks.shape[-1])]
    opened = leaves.masked_fill(~here, _UNUSED)  # of this level, ascending
    for height in range(len(groups)):
        children, theirs = slots[height][..., :0], used[height][..., :0]
        above = None
        if height + 1 < len(groups):
            # what holds an opened group is opened, unless it is a neighbour and was never read as a whole
            parent = opened >> 1
            far = (parent - (n >> (height + 1))[..., None]).abs() > radius[height + 1]
            fresh = torch.ones_like(far)
            fresh[..., 1:] = parent[..., 1:] != parent[..., :-1]
            far = far & fresh & (opened != _UNUSED)
            above = parent.masked_fill(~far, _UNUSED).sort(-1).values[..., : max(groups[height + 1], 1)]
            children = (2 * above[..., None].long() + torch.arange(2, device=x.device)).flatten(-2)
            theirs = (above != _UNUSED).repeat_interleave(2, -1) & (children < exists[height])
        ids, ok = torch.cat([slots[height], children], -1), torch.cat([used[height], theirs], -1)
        ok = ok & (ids[..., None] != opened[..., None, :]).all(-1)
        listed.append(ids + (start >> height)[..., None] + starts[height])
        there.append(ok)
        if above is not None:
            opened = above
    far = pack_lists(torch.cat(listed, -1), torch.cat(there, -1))
    return *near, *far


def _scores(x: Tensor, rows: Tensor, bias: Tensor, at: Tensor, there: Tensor, plan: Opening) -> Tensor:
    """[B, lists, t, C] of the groups `at`, -inf where there is none."""
    batch, heads, tokens, width = x.shape
    kv_heads, many = rows.shape[1:3]
    stack = heads // at.shape[1]
    at = at.masked_fill(~there, 0)
    row = (at[..., None] * plan.detail + torch.arange(plan.detail, device=x.device)).flatten(-2)
    unit = torch.arange(batch * at.shape[1], device=x.device).view(batch, at.shape[1], 1, 1)
    head = unit // at.shape[1] * kv_heads + unit % at.shape[1] // (at.shape[1] // kv_heads)
    seen = rows.reshape(-1, width).index_select(0, (head * many + row).flatten()).view(*row.shape, width)
    asking = x.view(batch, at.shape[1], stack, tokens, width).transpose(2, 3)
    logits = asking @ seen.mT  # [B, lists, t, stack, C * detail]
    known = bias.expand(batch, 1, many).reshape(-1)
    known = known[torch.arange(batch, device=x.device)[:, None, None, None] * many + row]
    score = (logits + known[..., None, :]).unflatten(-1, (-1, plan.detail))
    score = score.logsumexp(-1) if plan.summed else score.amax(-1)
    score = score.masked_fill(~there[..., None, :], float("-inf"))
    if stack == 1:
        return score[..., 0, :]
    # a head without candidates gives nan, which is hidden
    score = score.log_softmax(-1).logsumexp(-2)
    return score.masked_fill(~there, float("-inf"))


class Boxes(NamedTuple):
    """Least and largest key and value of each row of the far buffer, float64: [B, G, R, 2 D] and [B, G, R, 2 E].

    Args:
        lead: so many rows before them are tokens, read as themselves.
    """

    keys: Tensor
    values: Tensor
    count: Tensor  # [1|B, 1, R], log
    lead: int


def boxes(
    keys: Float[Tensor, "B G N m D"],
    values: Float[Tensor, "B G N m E"],
    present: Bool[Tensor, "#B N m"] | None,
    rank: int,
    lead: int,
    *,
    levels: int,
    complete: bool,
) -> Boxes:
    """The boxes of the rows of all levels, from the blocks of tokens as they are read."""
    found = []
    for x in (keys, values):
        found.append(sketch("box", x.double(), present, rank, levels=levels, complete=complete))
    keys, values = (torch.cat([x.rows.flatten(2, 3) for x in level], 2) for level in found)
    return Boxes(keys, values, told("box", found[0])[1], lead)


def omitted(
    q: Float[Tensor, "B H T D"],
    part: Partial,
    far: Rows,
    lists: tuple[Tensor, Tensor],
    boxes: Boxes,
    rank: int,
    scale: float,
) -> Float[Tensor, "B H T"]:
    """At most how far the output is from full attention's, in any channel: what reading means instead of tokens costs.

    With s_j the logits of the tokens of a row r of c tokens, mean logit a_r and mean value, and out the output so far,
    full attention differs from it by

        (1 / Z) sum_r sum_{j in r} (e^{s_j} - e^{a_r}) (v_j - out)

    because the means of r add up to the same with e^{a_r} for e^{s_j}. Z is at least the Z so far (Jensen). Now
    sum_j |x_j| = 2 sum_j max(x_j, 0) - sum_j x_j, sum_j (e^{s_j} - e^{a_r}) >= 0, and max(e^s - e^a, 0) is convex in s:
    it is largest when all s_j are at the ends l, u of what the box of r's keys allows, a share (a - l) / (u - l) at u.
    So with the box of r's values the difference is at most

        (1 / Z so far) sum_r 2 c (a - l) / (u - l) (e^u - e^a) max(v_max - out, out - v_min)

    in float64, with a margin for the rounding of `part`: 1/1000 of it, and eps (64 + D max_r |x| . |k|) max |v|.
    For means of the tokens without further bias.
    """
    batch, heads, tokens, width = q.shape
    index, count = lists
    many, picks = index.shape[1], index.shape[3]
    stack = heads // many
    x = (q.detach().double() * scale).view(batch, many, stack, tokens, width)
    out = part.out.detach().double().view(batch, many, stack, tokens, -1)
    lse = part.lse.detach().double().view(batch, many, stack, tokens, 1)
    largest = boxes.values.abs().amax((1, 2, 3))[:, None, None, None] if boxes.values.shape[2] else x.new_zeros(())
    found = x.new_empty(batch, many, stack, tokens)
    eps = torch.finfo(part.lse.dtype).eps
    far_k = torch.nn.functional.pad(far.k.detach().double()[:, :, boxes.lead :], (0, 0, 0, 1))
    keys, values = (torch.nn.functional.pad(y, (0, 0, 0, 1)) for y in (boxes.keys, boxes.values))
    counts = torch.nn.functional.pad(boxes.count, (0, 1), value=float("-inf")).expand(batch, 1, -1)
    unused = keys.shape[2] - 1
    step = max(1, _STEP // max(1, batch * heads * picks * rank * (width + out.shape[-1])))
    for start in range(0, tokens, step):
        cut = slice(start, min(start + step, tokens))
        row = (index[:, :, cut, :, None].long() * rank + torch.arange(rank, device=q.device)).flatten(-2) - boxes.lead
        there = torch.arange(picks, device=q.device) < count[:, :, cut, None]
        # tokens read as themselves cost nothing
        row = row.masked_fill(~there.repeat_interleave(rank, -1) | (row < 0), unused)
        mean, key, value, share = (_rows_of(y, row) for y in (far_k, keys, values, counts[..., None]))
        low, high = key.chunk(2, -1)
        asking = x[:, :, :, cut].transpose(2, 3)  # [B, lists, t, stack, D]
        middle, reach = asking @ ((low + high) / 2).mT, asking.abs() @ ((high - low) / 2).mT
        a = asking @ mean.mT
        least, most = torch.minimum(middle - reach, a), torch.maximum(middle + reach, a)
        at_most = ((a - least) / (most - least).masked_fill(most == least, 1.0)).clamp(0, 1)
        known = share[..., 0][..., None, :] - lse[:, :, :, cut].transpose(2, 3)
        mass = 2 * at_most * ((known + most).exp() - (known + a).exp())
        mass = mass.masked_fill((at_most == 0) | (known == float("-inf")), 0.0)
        here = out[:, :, :, cut].transpose(2, 3)[..., None, :]
        below, above = (y[..., None, :, :] for y in value.chunk(2, -1))
        away = torch.maximum(above - here, here - below)  # [B, lists, t, stack, rows, E]
        total = (mass[..., None, :] @ away)[..., 0, :].amax(-1)
        rounding = eps * (64 + width * (asking.abs() @ torch.maximum(low.abs(), high.abs()).mT).amax(-1))
        found[:, :, :, cut] = (total * 1.001 + rounding * largest).transpose(2, 3)
    return found.view(batch, heads, tokens)


def _rows_of(x: Tensor, row: Tensor) -> Tensor:
    """Rows [B, lists, t, R] of x [B, heads, S, X], each list those of its head: [B, lists, t, R, X]."""
    batch, heads, many, width = x.shape
    lists = row.shape[1]
    unit = torch.arange(batch * lists, device=x.device).view(batch, lists, 1, 1)
    head = unit // lists * heads + unit % lists // (lists // heads)
    return x.reshape(-1, width).index_select(0, (head * many + row).flatten()).view(*row.shape, width)


def attend_opened(
    q: Float[Tensor, "B H T D"],
    tokens: Rows,
    far: Rows,
    x: Float[Tensor, "B H T F"],
    sketches: tuple[Tensor, Tensor],
    where: Where,
    opening: Opening,
    *,
    radius: Sequence[int],
    groups: Sequence[int],
    starts: Sequence[int],
    block: int,
    rank: int,
    first: int = 0,
    scale: float | None = None,
    boxes: Boxes | None = None,
) -> tuple[Partial, Tensor | None]:
    """Attention of each query over its own lists; so many queries at a time that their lists stay within `LISTS`.

    With `boxes` also the bound `omitted`.

    Args:
        tokens: all of them, token r at position r.
        far: the pyramid that `starts` tells of.
        first: position of the first query.
    """
    batch, heads, many, width = q.shape
    kv_heads = tokens.k.shape[1]
    stack = heads // kv_heads if opening.shared else 1
    summaries = far
    if opening.shared:
        # heads that share a list are, with their key head, one sequence
        tokens, far = (_apart(rows) for rows in (tokens, far))
    each = 4 * batch * (heads // stack) * sum(_widths(opening, radius, groups))
    step = max(1, LISTS // max(each, 1))
    outs, sums, bounds = [], [], []
    for start in range(0, many, step):
        cut = slice(start, min(start + step, many))
        here = Where(*(y[:, cut] for y in where))
        lists = opened_lists(x[:, :, cut], *sketches, here, opening, radius=radius, groups=groups, starts=starts)
        asking, listed_far = q[:, :, cut], lists[1]
        size = asking.shape[2]
        if opening.shared:
            asking = asking.reshape(batch * kv_heads, stack, size, width)
            lists = [[y.flatten(0, 1)[:, None] for y in pair] for pair in lists]
        (near, near_count), (listed, count) = lists
        sources = [
            (tokens, Layout(near, near_count, 1, block, size, len(tokens), opening.causal)),
            # what is far and listed is past
            (far, Layout(listed, count, 1, rank, size, len(far), False)),
        ]
        position = torch.arange(first + start, first + start + size, device=q.device) if first + start else None
        found = attend(asking, sources, scale=scale, position=position)
        outs.append(found.out.reshape(batch, heads, size, tokens.v.shape[3]))
        sums.append(found.lse.reshape(batch, heads, size))
        if boxes is not None:
            factor = width**-0.5 if scale is None else scale
            part = Partial(outs[-1], sums[-1])
            bounds.append(omitted(q[:, :, cut], part, summaries, listed_far, boxes, rank, factor))
    part = Partial(*(xs[0] if len(xs) == 1 else torch.cat(xs, 2) for xs in (outs, sums)))
    return part, None if boxes is None else torch.cat(bounds, 2)


def attend_runs(
    q: Float[Tensor, "B H T D"],
    tokens: Rows,
    far: Rows,
    near_list: tuple[Tensor, Tensor],
    far_list: tuple[Tensor, Tensor],
    hold: int,
    block: int,
    rank: int,
    scale: float,
    start: int = 0,
) -> Partial:
    """Attention of runs of `hold` queries, each over its own near and far list [B, G or H, runs, P].

    Args:
        near_list: the last entry of each list is the block that the run is in.
        start: position of the first query, a multiple of the block.
    """
    batch, heads, many, width = q.shape
    kv_heads = tokens.k.shape[1]
    # further tokens: what a query has in its own block stands where it does itself, and all other blocks are past.
    # Kernels that are given positions are slower than two of them that are not
    here = Rows(tokens.k[:, :, start:], tokens.v[:, :, start:])
    asking, (index, count), (far_index, far_count) = q, near_list, far_list
    if index.shape[1] != heads:
        tokens, far = (_apart(rows) for rows in (tokens, far))
        asking = q.reshape(batch * kv_heads, heads // kv_heads, many, width)
        index, count, far_index, far_count = (y.flatten(0, 1)[:, None] for y in (index, count, far_index, far_count))
    near = Layout(index, count - 1 if start else count, hold, block, many, len(tokens), not start)
    # what is far and listed is past
    listed = Layout(far_index, far_count, hold, rank, many, len(far), False)
    found = attend(asking, [(tokens, near), (far, listed)], scale=scale)
    found = Partial(found.out.reshape(batch, heads, many, -1), found.lse.reshape(batch, heads, many))
    if not start:
        return found
    own = torch.arange(-(-many // block), dtype=torch.int32, device=q.device)
    layout = Layout(own[None, None, :, None], torch.ones_like(own)[None, None], block, block, many, len(here), True)
    return merge(found, attend(q, here, layout, scale=scale))


def _apart(rows: Rows) -> Rows:
    """Every key head a sequence of its own."""
    batch, heads = rows.k.shape[:2]
    bias = rows.bias
    if bias is not None:
        bias = bias.view(1, 1, -1) if bias.dim() == 1 else bias
        bias = bias.expand(batch, heads, -1).reshape(batch * heads, 1, len(rows))
    return Rows(*(y.reshape(batch * heads, 1, *y.shape[2:]) for y in (rows.k, rows.v)), bias=bias)
