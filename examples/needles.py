"""How much of one far token that matters survives: random keys, one of them planted to match the last query.

python examples/needles.py --tokens 16k,64k --strengths 6,8,12
python examples/needles.py --trials 2 --tokens 4k           # a minute's look

Queries and keys are normal and the logits of all tokens have standard deviation sigma; one token, anywhere beyond the
near field, is turned along the query until its logit is `strength`. The last query reads all this by plain FMA, by FMA
that opens k groups chosen by each score, by the k blocks of best mean key beside the window (as NSA and MoBA choose),
and exactly. The needle alone has a value, so that the output is its weight. Reported is the share of its exact weight
that is left, at most 1, on average over the trials; how often its block was read token by token; and rows and tokens
read. Nothing is trained.
"""

import argparse
import json
from itertools import accumulate
from pathlib import Path

import torch

from farfield.bench import records
from farfield.ops.attend import attend
from farfield.ops.multipole import reached
from farfield.ops.pool import Tree
from farfield.select import opened
from farfield.select.scored import Scoring, attend_chosen, block_means, choose
from farfield.select.static import radii
from farfield.summarize import MeanPool, pyramid
from farfield.types import Layout, Rows


def main(
    tokens=(16384, 65536),
    sigmas=(0.5, 1.0, 2.0),
    strengths=(6.0, 8.0, 12.0, 16.0),
    *,
    picks=(1, 4, 8, 16),
    beam=64,
    block=64,
    near=128,
    rank=4,
    detail=4,
    segments="best",
    width=64,
    trials=20,
    out=None,
    quiet=False,
):
    setting = {"block": block, "near": near, "rank": rank, "detail": detail, "beam": beam, "width": width}
    setting["segments"] = segments
    table = []
    for n in tokens:
        for sigma in sigmas:
            found = {}
            for trial in range(trials):
                for strength in strengths:
                    keys, query, at = _planted(n, near + block, sigma, strength, width, trial)
                    for who, result in _readings(keys, query, at, picks, setting).items():
                        found.setdefault((strength, who), []).append(result)
            for (strength, (contender, k)), results in sorted(found.items()):
                left, hit, rows, read = torch.tensor(results, dtype=torch.float64).mean(0).tolist()
                table.append(
                    {"tokens": n, "sigma": sigma, "strength": strength, "contender": contender, "open": k,
                     "survives": left, "found": hit, "rows": rows, "tokens_read": read}
                )  # fmt: skip
                if not quiet:
                    print(
                        f"{n:7d} tokens  sigma {sigma:g}  strength {strength:4g}  {contender:>5} k={k:<2d}  "
                        f"survives {left:.3f}  found {hit:.2f}  rows {rows:.0f}",
                        flush=True,
                    )
    if out is not None:
        env = records.environment()
        path = records.results_path("needles", out)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"bench": "needles", "setting": setting, "trials": trials, "seeds": [0, trials - 1]}
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**about, **row, "env": env}) + "\n" for row in table)
    return table


def _planted(tokens, near, sigma, strength, width, seed):
    """keys [1, 1, n, D], the query [1, 1, 1, D], and where the needle is."""
    gen = torch.Generator().manual_seed(seed)
    keys = sigma * torch.randn(1, 1, tokens, width, generator=gen)
    query = torch.randn(1, 1, 1, width, generator=gen)
    at = int(torch.randint(0, tokens - 2 * near, (), generator=gen))
    along = query[0, 0, 0] / query.square().sum()
    needle = keys[0, 0, at]
    keys[0, 0, at] = needle + (strength * width**0.5 - needle @ query[0, 0, 0]) * along
    return keys, query, at


def _readings(keys, query, at, picks, setting):
    """For each contender and k: share of the weight that is left, whether the needle was found, rows and tokens."""
    block, near, rank = setting["block"], setting["near"], setting["rank"]
    n, scale = keys.shape[2], keys.shape[3] ** -0.5
    logits = (query.double() @ keys.double().mT)[0, 0, 0] * scale
    exact = float(logits.softmax(0)[at])
    values = torch.zeros(1, 1, n, 1)
    values[0, 0, at] = 1

    blocks, radius = n // block, near // block
    levels = reached(blocks, radius)
    tree = Tree(block, rank, blocks - 1 - radius, levels, True, 0, (blocks - 1 - radius) * block)
    means = pyramid(MeanPool(), keys, values, tree)
    far = Rows(means.far_k, means.far_v, bias=means.bias)
    where = opened.place(n - 1, n, block, keys.device)
    starts = list(accumulate(tree.groups[:-1], initial=0))
    options = {"radius": radii(near, block, levels), "groups": tree.groups, "starts": starts}
    found = {("exact", 0): (1.0, 1.0, n, n)}
    cut = keys[:, :, : tree.blocks * block].unflatten(2, (tree.blocks, block))
    for score in opened.SCORES:
        sketches = opened.told(score, opened.sketch(score, cut, None, setting["detail"], levels=levels))
        # a learned score as it starts
        weight = torch.full((1, keys.shape[3]), 0.5) if score == "learned" else None
        x = opened.asked(score, query, scale, weight)
        for k in picks if score != "mean" else (0, *picks):
            summed = setting["segments"] == "sum"
            opening = opened.Opening(k, max(setting["beam"], k), True, setting["detail"], 0, True, summed)
            lists = opened.opened_lists(x, *sketches, where, opening, **options)
            (index, count), (far_index, far_count) = lists
            sources = [
                (Rows(keys, values), Layout(index, count, 1, block, 1, n, True)),
                (far, Layout(far_index, far_count, 1, rank, 1, len(far))),
            ]
            weight = attend(query, sources, position=torch.tensor([n - 1])).out.item()
            read = int(count) * block
            hit = float(at // block in index[0, 0, 0, : int(count)])
            found[score if k else "plain", k] = min(weight / exact, 1.0), hit, read + int(far_count) * rank, read
    for k in picks:
        # the window reads as many tokens as FMA's near field
        plan = Scoring(block, k + radius + 1, block, block, local=radius + 1, shared=False)
        choice = choose(query, block_means(keys, block), plan, first=n - 1)
        weight = attend_chosen(query, Rows(keys, values), choice, block, first=n - 1).out.item()
        hit = float(at // block in choice.index[0, 0, 0, : int(choice.count)])
        read = int(choice.count) * block
        found["nsa", k] = min(weight / exact, 1.0), hit, read, read
    return found


def _numbers(text, kind):
    return [kind(float(x.rstrip("k")) * (1024 if x.endswith("k") else 1)) for x in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="16k,64k", help="lengths (default: %(default)s)")
    parser.add_argument("--sigmas", default="0.5,1,2", help="standard deviations of the logits (default: %(default)s)")
    parser.add_argument("--strengths", default="6,8,12,16", help="logits of the needle (default: %(default)s)")
    parser.add_argument("--picks", default="1,4,8,16", help="groups opened, k (default: %(default)s)")
    for name, default, what in (
        ("beam", 64, "groups looked into on every level"),
        ("block", 64, "tokens of a block"),
        ("near", 128, "tokens of the near field"),
        ("rank", 4, "rows of a summary"),
        ("detail", 4, "rows of a sketch"),
        ("trials", 20, "key sets, each with its own query and needle"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--segments", default="best", choices=("best", "sum"), help="what a group scores (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder for the record; default: none is written")
    given = vars(parser.parse_args())
    lists = {name: _numbers(given.pop(name), int) for name in ("tokens", "picks")}
    lists |= {name: _numbers(given.pop(name), float) for name in ("sigmas", "strengths")}
    main(**lists, **given)
