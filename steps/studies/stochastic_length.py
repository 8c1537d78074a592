"""What Stochastic Length leaves of sequences' lengths, and how evenly it loads ranks that wait for each other.

On lengths alone: of data sets, and of the distribution that comes nearest to the paper's table, whose lengths are not
public. Expected sparsities follow from the rule; drawn ones are beside them.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog

from steps.data.sequences import load_sequences
from steps.data.stochastic_length import draw_lengths, expected_lengths
from steps.studies.rows import Row, row

NEAREST = "nearest"
SPARSITY, BALANCE = "sparsity", "balance"
METHODS = ("whole", "stochastic", "balanced")
_HALVINGS = 40  # of the interval that a longest length is looked for in


def cases(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Sparsity on each data set and on the nearest distribution; then the balance of ranks."""
    names = [*plan["settings"]["longest"], NEAREST]
    return [{"part": SPARSITY, "data": name} for name in names] + [
        {"part": BALANCE, "data": name} for name in plan["settings"]["balance"]["longest"]
    ]


def measure(case: dict[str, Any], plan: dict[str, Any], data: Path) -> list[Row]:
    """Rows of a case: by longest window and alpha the expected and the drawn sparsity, and the published one; or by
    ranks and method what the slowest rank costs."""
    settings = plan["settings"]
    digest = None
    if case["data"] == NEAREST:
        lengths = nearest(settings["nearest"])
    else:
        sequences, digest = load_sequences(data / "processed" / case["data"], torch.device("cpu"))
        lengths = sequences.offsets.diff()
    case = case | {"sequences": len(lengths)}
    if case["part"] == BALANCE:
        return [one | ({"data_sha256": digest} if digest else {}) for one in balance(case, lengths, settings)]
    published = {(one["alpha"], one["longest"]): one["value"] for one in settings["nearest"]["sparsity"]}
    found = []
    for longest in settings["longest"].get(case["data"]) or sorted({longest for _, longest in published}):
        for alpha in settings["alphas"]:
            axes = case | {"longest": longest, "alpha": alpha}
            cut = lengths.clamp(max=longest)
            expected = sparsity(expected_lengths(cut, longest, alpha), longest)
            found.append(row(axes, "expected", round(expected, 6), "fraction", data_sha256=digest))
            random = torch.Generator().manual_seed(0)
            drawn = torch.tensor(
                [sparsity(draw_lengths(cut, longest, alpha, random), longest) for _ in range(settings["draws"])]
            )
            half = settings["deviations"] * float(drawn.std()) / math.sqrt(len(drawn))
            middle = float(drawn.mean())
            interval = {"low": round(middle - half, 6), "high": round(middle + half, 6)}
            found.append(row(axes, "drawn", round(middle, 6), "fraction", **interval, data_sha256=digest))
            if case["data"] == NEAREST:
                found.append(row(axes, "published", published[alpha, longest], "fraction"))
    if case["data"] == NEAREST:
        there, counts = lengths.unique(return_counts=True)
        for length, count in zip(there.tolist(), counts.tolist(), strict=True):
            found.append(row(case | {"length": length}, "share", round(count / len(lengths), 6), "fraction"))
    return found


def sparsity(kept: torch.Tensor, longest: int) -> float:
    """1 - the mean length over the longest."""
    return 1 - float(kept.double().mean()) / longest


def nearest(settings: dict[str, Any]) -> torch.Tensor:
    """Lengths of so many `sequences`, of whose expected sparsities the one that is furthest from its published value
    is as near to it as any distribution of lengths allows: a linear program."""
    points = tuple((one["alpha"], one["longest"], one["value"]) for one in settings["sparsity"])
    return _nearest(points, settings["step"], settings["sequences"])


@cache
def _nearest(points: tuple[tuple[float, int, float], ...], step: int, sequences: int) -> torch.Tensor:
    most = max(longest for _, longest, _ in points)
    lengths = torch.arange(step, most + step, step).clamp(max=most)
    of_length = np.stack(
        [
            1 - expected_lengths(lengths.clamp(max=longest), longest, alpha).numpy() / longest
            for alpha, longest, _ in points
        ]
    )
    values = np.array([value for *_, value in points])
    # The unknowns are the shares, and the largest deviation, which is to be least.
    deviation = -np.ones((len(points), 1))
    found = linprog(
        np.append(np.zeros(len(lengths)), 1.0),
        A_ub=np.block([[of_length, deviation], [-of_length, deviation]]),
        b_ub=np.concatenate([values, -values]),
        A_eq=np.append(np.ones(len(lengths)), 0.0)[None],
        b_eq=[1.0],
    )
    return lengths.repeat_interleave(torch.from_numpy(sequences * found.x[:-1]).round().long())


def balance(case: dict[str, Any], lengths: torch.Tensor, settings: dict[str, Any]) -> list[Row]:
    """By number of ranks and method: the slowest rank's load over the mean, the share of time that ranks wait in, and
    the share of tokens that is read.

    Whole windows; Stochastic Length, by each rank alone; and every rank's batch cut to the mean load of these, an idea
    of arXiv 2602.16986, here its longest windows first: none waits, but where a batch is lighter as a whole.
    """
    sizes, longest = settings["balance"], settings["balance"]["longest"][case["data"]]
    cut = lengths.clamp(max=longest)
    found = []
    for ranks in sizes["ranks"]:
        random = torch.Generator().manual_seed(0)
        shape = sizes["steps"], ranks, sizes["batch"]
        whole = cut[torch.randint(len(cut), shape, generator=random)]
        stochastic = draw_lengths(whole, longest, sizes["alpha"], random)
        balanced = cut_to(whole, load(stochastic).mean(1, keepdim=True))
        for method, read in zip(METHODS, (whole, stochastic, balanced), strict=True):
            loads = load(read)
            slowest = loads.amax(1) / loads.mean(1)
            axes = case | {"ranks": ranks, "method": method}
            found += [
                row(axes, "slowest", round(float(slowest.mean()), 4), "of the mean"),
                row(axes, "idle", round(float((1 - 1 / slowest).mean()), 4), "fraction"),
                row(axes, "read", round(float(read.sum() / whole.sum()), 4), "fraction"),
            ]
    return found


def load(lengths: torch.Tensor) -> torch.Tensor:
    """What attention over the windows of a batch, the last dimension, costs."""
    return lengths.double().square().sum(-1)


def cut_to(lengths: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The lengths (..., batch), in each batch none above the longest with which it costs what is `wanted` (...)."""
    low, high = torch.zeros_like(wanted).expand(lengths.shape[:-1]).clone(), lengths.amax(-1).double()
    fits = load(lengths) <= wanted
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = load(torch.minimum(lengths.double(), middle[..., None])) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.where(fits[..., None], lengths, torch.minimum(lengths, low[..., None].long().clamp(min=1)))
